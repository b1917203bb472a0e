"""Old names, until every caller has moved to `storage.workdir`."""

from newsbert_ray.storage.workdir import NAMES, as_given, at_hand, brought, fetch, moved, places

__all__ = ["NAMES", "as_given", "at_hand", "brought", "fetch", "moved", "places"]
