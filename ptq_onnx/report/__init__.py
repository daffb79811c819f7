"""Pages, pictures and the schema of the JSON, drawn from what ``analysis`` returns."""
