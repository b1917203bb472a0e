"""Old names, until serving has moved to `storage.workdir`."""

from newsbert_ray.storage.workdir import download_input as brought
from newsbert_ray.storage.workdir import fetch

__all__ = ["brought", "fetch"]
