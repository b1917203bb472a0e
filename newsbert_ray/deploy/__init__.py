"""Submits jobs to a cluster, and checks whether a machine is ready for a run."""
