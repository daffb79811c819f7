"""A whole run, from the files a user names to the files that are published."""
