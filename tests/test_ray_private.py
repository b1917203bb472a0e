"""One test for each use of Ray's private modules: the failing one names what a new version of Ray changed."""

from __future__ import annotations

import ast
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from newsbert_ray import ray_private
from newsbert_ray.ray_session import RaySession, ray_session


@pytest.fixture(scope="module")
def session() -> Iterator[RaySession]:
    """A private session with three CPUs."""
    with ray_session(cpus=3) as session:
        yield session


def wait_until(condition: Callable[[], bool], *, seconds: float = 20.0) -> None:
    """Fails if the condition does not become true in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_loopback_node() -> None:
    """A private session would listen on the network."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    with ray_private.loopback_node():
        assert ray_constants.ENABLE_RAY_CLUSTER is False
    assert before == ray_constants.ENABLE_RAY_CLUSTER


def test_own_sigterm(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """SIGTERM while Ray starts would end the command without its message, or print C++ frames."""
    from ray import _raylet
    from ray._private import utils

    raylet, handlers = cast("Any", _raylet), cast("Any", utils)

    def start() -> str:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.write(2, b"frames")
        return "core"

    monkeypatch.setattr(raylet, "CoreWorker", start)

    def own(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, own)
    try:
        with ray_private.own_sigterm():
            handlers.set_sigterm_handler(signal.SIG_DFL)
            assert signal.getsignal(signal.SIGTERM) is own
            assert raylet.CoreWorker() == "core"
        assert signal.getsignal(signal.SIGTERM) is own
        assert raylet.CoreWorker is start
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "frames" not in capfd.readouterr().err


def test_send_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may read a node's logs would have the bucket."""
    from ray.tune.execution import class_cache

    known = set(class_cache.ENV_VARS_TO_PROPAGATE)
    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", known | {"AWS_SECRET_ACCESS_KEY"})
    ray_private.send_no_keys()
    left = class_cache.ENV_VARS_TO_PROPAGATE
    assert left
    assert left == {name for name in known if not name.startswith("AWS_")}


def test_forget_authentication() -> None:
    """The second private session of a process would show the first one's token and be refused."""
    ray_private.forget_authentication()


def test_versions_program_imports() -> None:
    """`doctor` could not say which version a cluster has."""
    imports = [
        node for node in ast.parse(ray_private.VERSIONS_PROGRAM).body if isinstance(node, ast.ImportFrom)
    ]
    for node in imports:
        module = __import__(str(node.module), fromlist=[name.name for name in node.names])
        assert all(hasattr(module, name.name) for name in node.names)


@pytest.mark.ray
def test_dashboard_address(session: RaySession) -> None:
    """The first line of a run would not name the dashboard."""
    assert ray_private.dashboard_address() is None


@pytest.mark.ray
def test_has_autoscaler(session: RaySession) -> None:
    """A run would refuse to wait for nodes that are started on demand, or wait for nodes that never come."""
    assert not ray_private.has_autoscaler()


@pytest.mark.ray
def test_draining_nodes(session: RaySession) -> None:
    """A run would not write a checkpoint before its machine is taken away."""
    assert ray_private.draining_nodes() == set()


@pytest.mark.ray
def test_entries_are_received_once_in_order_by_their_own_follower(session: RaySession) -> None:
    """An evaluation would be lost, shown twice, or shown in another group's run."""
    for step in (1, 2, 3):
        ray_private.send_entry("one", {"step": step})
    ray_private.send_entry("one-more", {"step": 9})
    assert [entry["step"] for entry in ray_private.take_entries("one")] == [1, 2, 3]
    assert ray_private.take_entries("one") == []
    ray_private.forget_entries("one-more")
    assert ray_private.take_entries("one-more") == []


@pytest.mark.ray
def test_release_orphans_removes_only_a_dead_creators_group(session: RaySession) -> None:
    """Ray keeps it, with its CPUs, until the job ends; a living group's, or Tune's own, must stay."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    class Creator:
        def create(self) -> Any:
            group = placement_group([{"CPU": 1}])
            group.wait(20)
            return group

    creator: Any = ray.remote(num_cpus=0)(Creator)
    dead, living = creator.remote(), creator.remote()
    left, held = ray.get(dead.create.remote()), ray.get(living.create.remote())
    own = placement_group([{"CPU": 1}])
    assert own.wait(20)
    assert ray_private.release_orphans() == 2
    ray.kill(dead)
    wait_until(lambda: ray_private.release_orphans() == 1)
    states = [ray.util.placement_group_table(group)["state"] for group in (left, held, own)]
    assert states == ["REMOVED", "CREATED", "CREATED"]
    ray.kill(living)
    remove_placement_group(own)
    wait_until(lambda: ray_private.release_orphans() == 0)


@pytest.mark.ray
def test_end_controllers_kills_this_processs_own(session: RaySession) -> None:
    """Ctrl-C would leave a group's workers running until the whole job ends."""
    import ray
    from ray.exceptions import RayActorError

    class TrainController:
        def pid(self) -> int:
            return os.getpid()

    TrainController.__qualname__ = "TrainController"  # Ray Train's own is no local class
    controller: Any = ray.remote(num_cpus=0)(TrainController).remote()
    ray.get(controller.pid.remote())
    ray_private.end_controllers()

    def has_ended() -> bool:
        try:
            return bool(ray.get(controller.pid.remote()) == 0)  # a call may arrive before the kill does
        except RayActorError:
            return True

    wait_until(has_ended)


def test_group_trainer_starts_no_extra_actors() -> None:
    """Each run would leave an actor behind, which asks a dashboard that is not there."""
    from ray.train.torch import TorchTrainer

    trainer = ray_private.group_trainer()
    default = [type(c).__name__ for c in TorchTrainer(lambda: None)._create_default_callbacks()]  # type: ignore[attr-defined]
    ours = [type(c).__name__ for c in trainer(lambda: None)._create_default_callbacks()]  # type: ignore[attr-defined]
    assert set(default) - set(ours) == set(ray_private._NOT_STARTED)


def test_loopback_config_joins_a_group_without_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's store would listen on every network interface, without a token."""
    import ray
    import torch.distributed as dist

    class Group:
        """Ray's worker group with one worker, this process."""

        def __len__(self) -> int:
            return 1

        def get_resources_per_worker(self) -> dict[str, float]:
            return {"CPU": 1}

        def execute(self, function: Callable[..., Any]) -> None:
            assert callable(function)

        def execute_single(self, rank: int, function: Callable[..., Any], **given: Any) -> Any:
            return function(**given)

        execute_single_async = execute_single

    monkeypatch.setattr(ray, "get", list)
    config = ray_private.loopback_config()()
    config.backend_cls().on_start(Group(), config)
    try:
        assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, "gloo")
    finally:
        dist.destroy_process_group()


def test_walk_package(tmp_path: Path) -> None:
    """A job's package would hold other files than were counted."""
    (tmp_path / "data").mkdir()
    for name in ("a.py", "b.log", "data/c.txt", "data/d.txt"):
        (tmp_path / name).touch()
    (tmp_path / "data/.rayignore").write_text("c.txt\n")
    visited: list[str] = []
    ray_private.walk_package(
        tmp_path,
        lambda path: visited.append(path.name),
        root=tmp_path,
        excludes=["*.log"],
        skip=lambda path: path.name == ".rayignore",
        gitignore=True,
    )
    assert sorted(visited) == sorted([tmp_path.name, "a.py", "data", "d.txt"])


def test_cores_and_memory_of_this_machine() -> None:
    """`doctor` would advise by the machine's size instead of the container's."""
    import psutil

    assert 0 < ray_private.container_cores() <= (os.cpu_count() or 1)
    assert 0 < ray_private.available_memory() <= psutil.virtual_memory().total
