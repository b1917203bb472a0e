"""Models and splits to numbers."""
