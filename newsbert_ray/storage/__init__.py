"""Folders in buckets and their local copies."""
