"""From MIND's files to batches."""
