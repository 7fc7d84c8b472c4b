"""What both ends of the wire share: the protobuf stubs (v1), and how files travel (stream)."""
