"""Formats in and out. Imports nothing of ours, no network, no training framework."""
