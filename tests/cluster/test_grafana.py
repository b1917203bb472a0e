"""The Grafana dashboard queries only metrics that exist: ours, and those that a real Ray head exports."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from cluster.local import LocalCluster
from newsbert_ray.telemetry import METERS

FILE = Path(__file__).parents[2] / "cluster/grafana.json"
DASHBOARD: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
OURS = {f"ray_{name}{'_total' if meter.counter else ''}": name for name, meter in METERS.items()}
"""Names in Prometheus, with the prefix and the suffix that Ray adds, and ours."""
RAYS = {
    "ray_cluster_active_nodes",
    "ray_node_cpu_count",
    "ray_node_cpu_utilization",
    "ray_node_disk_free",
    "ray_node_disk_usage",
    "ray_node_mem_total",
    "ray_node_mem_used",
}
"""Ray's own metrics that the dashboard shows; the last test checks that a head exports them."""
RAYS_OF_GPUS = {"ray_node_gpus_utilization", "ray_node_gram_used"}
"""Exported only with a GPU; without one only their definition can be checked."""
END_SECONDS = 60.0

RUN = """
import sys, time
import ray
from newsbert_ray.telemetry import RunMeters, SweepMeters

ray.init(address="auto", log_to_driver=False)

@ray.remote(num_cpus=1)
class Trial:
    def train(self, folder, logs):
        meters = RunMeters(folder)
        for step in logs:
            meters({
                "kind": "log", "step": step, "epoch": 1, "titles_per_second": 50.0,
                "train": {"total": 1.0 / step}, "seconds": {"train": 0.5 * step, "data": 0.25 * step},
            })
            meters({"kind": "evaluation", "step": step, "epoch": 1.0,
                    "validation": {"student": {"accuracy": 0.625}}, "train": {}})

trial, sweep = Trial.remote(), SweepMeters("runs/beta")
# The same actor trains one trial after the other, as in a sweep.
ray.get(trial.train.remote("runs/beta/trials/a", [1, 2]))
ray.get(trial.train.remote("runs/beta/trials/b", [1, 2, 4]))
while sys.stdin.read(1):
    sweep.update({"running": 1, "finished": 7}, best=0.75)
    ray.get(trial.train.remote("runs/beta/trials/c", [1]))
"""


def _panels() -> list[dict[str, Any]]:
    return list(DASHBOARD["panels"])


def _expressions() -> Iterator[str]:
    for panel in _panels():
        for target in panel.get("targets", ()):
            yield target["expr"]


def _names(expression: str) -> set[str]:
    """The metrics in an expression, without the label filters in braces."""
    return set(re.findall(r"\b(?:ray|autoscaler)_\w+", re.sub(r"\{[^}]*\}", "", expression)))


QUERIED = {name for expression in _expressions() for name in _names(expression)}


def test_every_queried_metric_exists() -> None:
    """A panel whose metric was renamed shows `no data`, which looks like an idle cluster."""
    assert (QUERIED & OURS.keys()) | RAYS | RAYS_OF_GPUS == QUERIED
    assert len(QUERIED & OURS.keys()) >= 7


@pytest.mark.parametrize("name", OURS)
def test_every_metric_of_ours_is_shown(name: str) -> None:
    """A metric that no panel shows is useless. The speed of one trial is in the terminal's table."""
    assert name in QUERIED or name == "ray_newsbert_titles_per_second"


def test_tags_are_those_of_the_meters() -> None:
    """A filter on a tag that no series has empties its panel silently."""
    for expression in _expressions():
        for name, filters in re.findall(r"ray_(newsbert_\w+)\{([^}]*)\}", expression):
            tags = METERS[name.removesuffix("_total")].tags
            assert set(re.findall(r"(\w+)=", filters)) <= set(tags), expression


def test_it_can_be_imported_anywhere() -> None:
    """An id or data source of another Grafana would break the import or overwrite a dashboard."""
    ids = [panel["id"] for panel in _panels()]
    assert len(ids) == len(set(ids)) >= 10
    assert DASHBOARD["schemaVersion"] >= 39
    assert "uid" not in DASHBOARD
    assert DASHBOARD.get("id") is None
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    sources = {json.dumps(source) for source in _values(DASHBOARD, "datasource")}
    assert sources == {json.dumps({"type": "prometheus", "uid": "${datasource}"})}


def test_panels_do_not_overlap() -> None:
    """Grafana moves overlapping panels, so the page would look different on each screen."""
    taken: set[tuple[int, int]] = set()
    for panel in _panels():
        box = panel["gridPos"]
        cells = {
            (x, y) for x in range(box["x"], box["x"] + box["w"]) for y in range(box["y"], box["y"] + box["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def _values(node: Any, key: str) -> Iterator[Any]:
    """Every value under `key` in a nested structure."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            else:
                yield from _values(value, key)
    elif isinstance(node, list):
        for item in node:
            yield from _values(item, key)


def _scrape(cluster: LocalCluster) -> str:
    """Everything that Prometheus would scrape from this head."""
    text = ""
    (targets,) = cluster.folder.glob("ray/prom_metrics_service_discovery.json")
    for group in json.loads(targets.read_text()):
        for target in group["targets"]:
            assert target.startswith("127.0.0.1:")
            try:
                with urlopen(f"http://{target}/metrics", timeout=10) as answer:
                    text += answer.read().decode()
            except OSError:  # some servers start after the head
                continue
    return text


def _read(text: str) -> dict[tuple[str, str], dict[str, float]]:
    """(metric, labels except `run`) -> run -> value, summed over processes."""
    series: dict[tuple[str, str], dict[str, float]] = {}
    for name, labels, value in re.findall(r"^(ray_newsbert_\w+)\{(.*)\} (\S+)$", text, flags=re.MULTILINE):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        own = [tag for tag in METERS[name.removeprefix("ray_").removesuffix("_total")].tags if tag != "run"]
        runs = series.setdefault((name, ",".join(tags[tag] for tag in own)), {})
        runs[tags["run"]] = runs.get(tags["run"], 0.0) + float(value)
    return series


@pytest.mark.ray
@pytest.mark.slow
def test_a_real_head_exports_every_queried_metric() -> None:
    """Ray renames metrics between versions and drops gauges that are set once; both empty a panel."""
    pytest.importorskip("ray")
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    assert {f"ray_{name}" for name in METRICS_GAUGES} >= RAYS_OF_GPUS
    wanted = RAYS | OURS.keys()
    often = {"RAY_metrics_report_interval_ms": "1000"}
    with LocalCluster(cpus=1, variables=often) as cluster:
        path = {"PYTHONPATH": os.pathsep.join(sys.path)}
        environment = {**os.environ, **cluster.environment, **often, **path}
        command = [sys.executable, "-c", RUN]
        with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, text=True) as driver:
            assert driver.stdin is not None
            seen: set[str] = set()
            series: dict[tuple[str, str], dict[str, float]] = {}
            end = time.monotonic() + END_SECONDS
            while wanted - seen and time.monotonic() < end and driver.poll() is None:
                driver.stdin.write(".")
                driver.stdin.flush()
                text = _scrape(cluster)
                seen |= set(re.findall(r"^(\w+)[{ ]", text, flags=re.MULTILINE))
                series |= _read(text)
                time.sleep(0.5)
            driver.stdin.close()
            driver.wait(30)
    assert wanted - seen == set()
    assert series["ray_newsbert_titles_per_second", "c"] == {"beta": 50.0}
    assert series["ray_newsbert_validation", "c,student,accuracy"] == {"beta": 0.625}
    assert series["ray_newsbert_loss", "c,total"] == {"beta": 1.0}
    assert series["ray_newsbert_trials", "finished"] == {"beta": 7.0}
    assert series["ray_newsbert_trials", "waiting"] == {"beta": 0.0}
    assert series["ray_newsbert_best", ""] == {"beta": 0.75}
    counted = series["ray_newsbert_seconds_total", "train"]["beta"]
    assert counted >= 0.5 * 6  # a: 1.0, b: 2.0
    assert series["ray_newsbert_seconds_total", "data"]["beta"] == pytest.approx(counted / 2)
    assert series["ray_newsbert_titles_total", ""]["beta"] == pytest.approx(50 * 1.5 * counted)
