"""One training loop, alone or in a Ray Train group."""
