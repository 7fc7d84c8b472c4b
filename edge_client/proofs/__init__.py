"""Signed receipts and manifests, and whose keys signed them."""
