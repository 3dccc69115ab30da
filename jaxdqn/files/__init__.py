"""Files that people give, and files that are kept: paths, documents in YAML and JSON."""
