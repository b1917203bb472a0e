"""What stands behind numbers: data, teacher, what varied, versions, hardware. Differences are said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from newsbert_ray.record import RunRecord
from newsbert_ray.reporting.compared import data_name, one_task, teacher_name, units_of, varying_settings


def provenance(records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Data, teacher, what varies, versions and hardware of the records, by name."""
    varying = varying_settings(records)
    return [
        _kinds("data", [_describe_data(record) for record in records]),
        _kinds("teacher", [teacher_name(record) for record in records]),
        ("settings that vary", ", ".join(varying) or "none"),
        _kinds("versions", [joined(record.versions) for record in records]),
        _kinds("hardware", [joined(record.hardware) for record in records]),
    ]


def joined(values: Mapping[str, object]) -> str:
    """`python 3.11.7, torch 2.13.0`."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _describe_data(record: RunRecord) -> str:
    parts = ("train", "validation", "test")
    units = units_of(one_task([record]))
    sizes = [f"{n:,} {units[part]}{part}" for part in parts if (n := record.data.get(f"{part}_rows"))]
    return ", ".join([data_name(record), *sizes])


def _kinds(name: str, values: Sequence[str]) -> tuple[str, str]:
    kinds = list(dict.fromkeys(values))
    return (name, kinds[0]) if len(kinds) == 1 else (f"{name} (they differ)", "; ".join(kinds))
