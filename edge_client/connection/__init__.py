"""The connection to a coordinator: found, trusted, retried."""
