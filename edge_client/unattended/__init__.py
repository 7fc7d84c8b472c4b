"""Taking part without a person: watching for jobs, and the system's service."""
