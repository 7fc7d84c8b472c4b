"""GGUF files: base models, adapters, merging and quantising."""
