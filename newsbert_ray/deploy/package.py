"""What a submitted job takes along: files, variables, requirements; and the checks before anything is sent.
Ray uploads the zip that is written here, so names and size of the files are known before."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import ZipFile

from newsbert_ray.config import SettingsError
from newsbert_ray.files import format_size
from newsbert_ray.ray_private import walk_package
from newsbert_ray.secrets import find_secrets, is_secret_name, mask_text

LIMIT_BYTES = 100_000_000
"""Largest package: Ray takes 104,857,600 bytes in one request, with the names of all files."""
MAX_FILES = 20_000
SECRETS = (".env", ".env.*", ".netrc", ".aws", ".ssh", ".ray", "*.pem", "*.key", "auth_token")
"""Where secrets usually are, as .gitignore patterns; never sent."""
EXCLUDES = (
    *(".git", ".venv", "venv", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis"),
    *("/runs", "/data", "/demo", "/bench", "/shards", "/build", "/dist"),
    *("*.pt", "*.pth", "*.ckpt", "*.bin", "*.safetensors", "*.parquet"),
)
"""Caches, results, data and weights: sent only with --include."""
_OWN = "newsbert_ray/__init__.py"


class PackageError(ValueError):
    """A working directory that cannot be sent; the text names the reason and the cure."""


@dataclass
class Package:
    """What is sent from `root`: the path of each file by its name in the package. `links` were left out,
    because they lead to a folder or out of `root`."""

    root: Path
    files: dict[str, Path] = field(default_factory=dict)
    links: set[str] = field(default_factory=set)

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(path.stat().st_size for path in self.files.values())

    @property
    def has_newsbert_ray(self) -> bool:
        """Whether newsbert_ray is one of root's own folders."""
        return self.files.get(_OWN) == self.root / _OWN

    def contains(self, name: str) -> bool:
        """Whether the file or folder `name`, relative to the root, is sent."""
        return name in (".", "", *self.files) or any(file.startswith(f"{name}/") for file in self.files)

    def add(self, start: Path, root: Path, excludes: Sequence[str], *, gitignore: bool = True) -> None:
        """Add the files at or below `start`; patterns and names are relative to `root`."""
        real = root.resolve()

        def is_skipped_link(path: Path) -> bool:
            """A link out of the folder may lead to a secret; a link to a folder may lead in a circle."""
            if skipped := path.is_symlink() and not (path.is_file() and path.resolve().is_relative_to(real)):
                self.links.add(path.relative_to(root).as_posix())
            return skipped

        def visit(path: Path) -> None:
            if path.is_file():
                self.files[path.relative_to(root).as_posix()] = path
                if len(self.files) > MAX_FILES:
                    names, first = _largest_folders(dict.fromkeys(self.files, 1), "{:,}".format)
                    what = f"more than {MAX_FILES:,} files, most of them in {names}"
                    cure = f"go to the project's folder, or leave some out with --exclude {first}"
                    raise PackageError(f"{root}: {what}; {cure}")

        options: Any = {"root": root, "excludes": excludes, "gitignore": gitignore}
        try:
            walk_package(start, visit, skip=is_skipped_link, **options)
        except OSError as error:
            fault = f"cannot be read ({error.strerror}); leave it out with --exclude PATTERN"
            raise PackageError(f"{error.filename}: {fault}") from error


def find_files(folder: str | Path, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Package:
    """The files of a folder that are sent, and those of newsbert_ray if the folder does not contain it.

    Not sent is what EXCLUDES, a .gitignore or a .rayignore names, unless `include` names it (/shards/,
    *.parquet); and what SECRETS or `exclude` names, patterns as in a .gitignore. PackageError: no such
    folder, one that cannot be read, or more than MAX_FILES files (probably a home folder or a data set) or
    LIMIT_BYTES, which Ray would refuse after the upload.
    """
    package, never = Package(root := Path(folder).absolute()), [*SECRETS, *exclude]
    if not root.is_dir():
        raise PackageError(f"--working_dir {root}: no such folder")
    package.add(root, root, [*EXCLUDES, *never])
    for path in (path for pattern in include for path in _matches(root, pattern)):
        package.add(path, root, never, gitignore=False)
    if not package.has_newsbert_ray:
        own = Path(__file__).parents[1]
        package.add(own, own.parent, [*EXCLUDES, *SECRETS])
    if package.bytes > LIMIT_BYTES:
        sizes = {name: path.stat().st_size for name, path in package.files.items()}
        names, first = _largest_folders(sizes, format_size)
        size, limit = format_size(package.bytes), format_size(LIMIT_BYTES)
        what = f"{size} in {len(sizes):,} files is more than the {limit} that can be sent; largest: {names}"
        cure = "or move data to a bucket or a shared disk and give its location there"
        raise PackageError(f"{root}: {what}. Leave them out with --exclude {first}, {cure}")
    return package


def write_zip(package: Package, path: Path) -> None:
    """Write the zip that Ray uploads; PackageError: an unreadable file, or a name that is not Unicode."""
    with ZipFile(path, "w", strict_timestamps=False) as archive:
        for name, file in package.files.items():
            try:
                archive.write(file, name)
            except (OSError, UnicodeEncodeError) as error:
                fault = f"cannot be sent ({error}); leave it out with --exclude PATTERN"
                raise PackageError(f"{str(file)!r}: {fault}") from error


def _matches(root: Path, pattern: str) -> Iterator[Path]:
    """The paths that a pattern names: without a slash at any depth, as in a .gitignore."""
    name = pattern.strip("/")
    if not name or ".." in name.split("/"):
        raise PackageError(f"--include {pattern}: expected a pattern such as /shards/ or *.parquet")
    return root.glob(name) if "/" in pattern.rstrip("/") else root.rglob(name)


def _largest_folders(sizes: Mapping[str, int], show: Callable[[float], str]) -> tuple[str, str]:
    """The three folders or files at the top with the largest sums, as a text; the name of the first."""
    sums: Counter[str] = Counter()
    for name, size in sizes.items():
        sums[f"{name.partition('/')[0]}/" if "/" in name else name] += size
    largest = sums.most_common(3)
    return ", ".join(f"{name} {show(size)}" for name, size in largest), largest[0][0]


ENVIRONMENT: Mapping[str, str] = {
    "PYTHONUNBUFFERED": "1",
    "TERM": "dumb",
    "COLUMNS": "110",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    # `--stop` acts as Ctrl-C, after which a sweep saves its state; after 30 s the job is killed.
    "RAY_JOB_STOP_SIGNAL": "SIGINT",
    "RAY_JOB_STOP_WAIT_TIME_S": "30",
}
"""Variables of every job: unbuffered lines, no cursor movements, room for a table."""
_PROGRAM = ("python", "-m", "newsbert_ray.cli")
_VISIBLE = "is visible to everyone who may look at the cluster; give the nodes a role or a cluster secret"


def runtime_environment(variables: Sequence[str], requirements: str | None) -> dict[str, Any]:
    """Ray's runtime environment without the working directory: ENVIRONMENT and the NAME=VALUE words, and what
    pip installs on every node from the file of requirements, without Ray itself. Raises SettingsError."""
    environment = dict(ENVIRONMENT)
    for word in variables:
        name, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise SettingsError(f"--env {name}: expected NAME=VALUE")
        if is_secret_name(name) or find_secrets(value):
            raise SettingsError(f"--env {name}: a secret in a job's environment {_VISIBLE}")
        environment[name] = value
    runtime: dict[str, Any] = {"env_vars": environment}
    if requirements is None:
        return runtime
    try:
        lines = Path(requirements).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--pip {requirements}: not a file of requirements ({error})") from error
    packages = [line.partition("#")[0].strip() for line in lines]
    kept = [name for name in packages if name and not re.match(r"ray\b(?!-)", name)]
    return {**runtime, "pip": {"packages": kept, "pip_check": False}}


def make_entrypoint(command: Sequence[str]) -> str:
    """The command line of a job: newsbert_ray from the job's own folder."""
    return shlex.join([*_PROGRAM, *command])


def check_job_name(job: str) -> str:
    """Return `job`, which becomes a part of addresses and file names on the head, or raise SettingsError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", job):
        raise SettingsError(f"{job!r} is not a job's name; expected letters, digits, '-', '_' and '.'")
    return job


_INPUTS = ("config", "space", "curves", "data", "source", "run", "folders", "input", "vectors", "behaviors")
_OUTPUTS = ("out", "submission")
_POSITIONAL = {"space": "search space", "run": "run", "folders": "folder", "vectors": "vectors"}
SHARED = "a URL such as s3://BUCKET/FOLDER, or an absolute path on a disk that all nodes share"


def check_paths(settings: Mapping[str, Any], package: Package) -> list[str]:
    """Refuse, by a SettingsError, paths in the command's settings ({"data": "shards", "out": "s3://..."})
    that the cluster cannot read, and results that would be lost. Returns lines about absolute paths."""
    absolute = []
    for name in (*_INPUTS, "teacher", *_OUTPUTS):
        value, flag = settings.get(name), _POSITIONAL.get(name, f"--{name}")
        for path in value if isinstance(value, list) else [value]:
            if not isinstance(path, str) or "://" in path:
                continue
            inside = os.path.normpath(path)
            local = package.root / inside
            if PurePosixPath(path).is_absolute() or path.startswith("~"):
                absolute.append(f"{flag} {path}")
            elif name in _OUTPUTS:
                where = "a relative path is in the job's own folder on the cluster, which Ray removes"
                raise SettingsError(f"{flag} {path}: {where}; give {SHARED}")
            elif package.contains(inside) or (name == "teacher" and not local.exists()):
                continue  # sent, or a Hugging Face name
            elif not local.exists() or inside.startswith(".."):
                raise SettingsError(f"{flag} {path}: not in {package.root}, which is sent; give {SHARED}")
            else:
                cure = f"or send it with --include /{inside}{'/' if local.is_dir() else ''}"
                what = "is not sent, so the cluster cannot read it"
                raise SettingsError(f"{flag} {path}: {what}; give {SHARED}, {cure}")
    return [f"note: every node must be able to read {', '.join(absolute)} at that path"] if absolute else []


def check_secrets(command: Sequence[str]) -> None:
    """Raise SettingsError where the command has a password in a URL."""
    for word in command:
        if find_secrets(word):
            raise SettingsError(f"{mask_text(word)}: a secret in a job's command {_VISIBLE}")
