"""Sweeps: what to vary, a trial, the search."""
