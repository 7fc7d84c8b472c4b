"""A person's files as rows, examples and batches."""
