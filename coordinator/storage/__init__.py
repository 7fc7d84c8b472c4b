"""What the coordinator keeps: rows in a database, blobs by digest, folders of publications."""
