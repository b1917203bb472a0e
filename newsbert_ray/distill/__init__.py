"""Distillation losses and gradient momentum: the equations of the paper."""
