"""Folders in buckets, and their copies on this machine."""
