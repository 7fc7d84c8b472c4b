"""gRPC: the server that clients and operators call, and how it is reached."""
