"""Files and folders of results: text, temporary folders, publishing, weights apart."""
