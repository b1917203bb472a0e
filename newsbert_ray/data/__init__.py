"""From source files to shards to batches."""
