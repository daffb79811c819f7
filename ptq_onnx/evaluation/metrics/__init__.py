"""What users ask of a model besides its closeness to float: one task per file."""
