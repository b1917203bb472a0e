"""Losses and gradient momentum: the equations of the paper."""
