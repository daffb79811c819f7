"""What a user may ask for: options, their types and files, targets as data, the stages of a run."""
