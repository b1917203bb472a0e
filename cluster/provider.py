"""The provider that `cluster.local` gives to Ray's autoscaler: it starts nodes as processes here."""

from __future__ import annotations

from newsbert_ray.ray_private import separate_nodes

SeparateNodes = separate_nodes()
