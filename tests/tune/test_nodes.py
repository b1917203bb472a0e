"""Each machine can read and write what trials will, or says so before the first."""

from __future__ import annotations

from pathlib import Path

import pytest

from newsbert_ray.ray_session import RaySession
from newsbert_ray.tune.resources import NodeError, check_nodes, find_fault, require_seen


def test_a_machine_that_lacks_something_says_what(shards: Path, tmp_path: Path) -> None:
    """A trial on a machine without the shared disk leaves its results where nobody finds them."""
    (tmp_path / "probe").touch()
    seen, out = str(tmp_path / "probe"), str(tmp_path)
    assert find_fault(out, seen, [str(shards)], [str(tmp_path)]) == ""
    assert "does not see" in find_fault(out, str(tmp_path / "gone"), [], [])
    assert "nowhere: give as --data a folder that all nodes share" in find_fault(out, seen, ["nowhere"], [])
    assert "nowhere: give as --teacher" in find_fault(out, seen, [], ["nowhere"])
    assert "cannot be written" in find_fault("/proc/here", seen, [], [])


def test_a_machine_that_comes_later_is_asked_too(tmp_path: Path) -> None:
    """The cluster grows while the sweep runs, and nobody has looked at the new machine."""
    require_seen(None)
    require_seen("s3://shelf/sweep")
    with pytest.raises(
        NodeError, match=r"this node does not see .*give as --out a folder that all nodes share"
    ):
        require_seen(str(tmp_path))
    (tmp_path / "sweep.json").touch()
    require_seen(str(tmp_path))


@pytest.mark.ray
def test_every_machine_is_asked(ray: RaySession, shards: Path, tmp_path: Path) -> None:
    """The driver's own machine sees everything; the others are those that count."""
    check_nodes(tmp_path, data=[str(shards)])
    assert not list(tmp_path.glob(".probe*"))
    with pytest.raises(NodeError, match=r"node 127\.0\.0\.1 \(\w+\): does not see .*nowhere"):
        check_nodes(tmp_path, data=[str(tmp_path / "nowhere")])
    assert not list(tmp_path.glob(".probe*"))
