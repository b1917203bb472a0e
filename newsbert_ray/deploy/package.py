"""The working directory as it goes to a cluster: which files, how large, in one zip. Knows no Ray."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import stat
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pathspec import GitIgnoreSpec

import newsbert_ray
from newsbert_ray.config import SettingsError
from newsbert_ray.files import format_size
from newsbert_ray.secrets import is_secret_name, mask_text, mask_url

LIMIT_BYTES = 100_000_000
"""Most that goes along, as it lies on disk: as `du` shows it, and known before anything is packed."""
REQUEST_BYTES = 104_857_600
"""Most that Ray takes in one request."""
MOST_FILES = 20_000
"""Where counting ends: no project, but a home folder or a data set."""
LEFT_OUT = (
    *(".git", ".venv/", "venv/", "__pycache__/", "*.egg-info/", ".*_cache/", ".hypothesis/"),
    *("/runs/", "/data/", "/demo/", "/bench/", "/shards/", "/build/", "/dist/"),
    *("*.pt", "*.pth", "*.ckpt", "*.bin", "*.safetensors", "*.parquet"),
    *(".env", ".env.*", ".netrc", ".aws/", ".ssh/", ".ray/", "*.pem", "*.key", "auth_token"),
)
"""Patterns of a .gitignore: caches; results, data and weights; where secrets usually lie."""
_IGNORE_FILES = (".gitignore", ".rayignore")
_OWN = "newsbert_ray"
_SAME_TIME = (1980, 1, 1, 0, 0, 0)


class PackageError(ValueError):
    """A working directory that cannot be sent; the text names what is in the way and the cure."""


@dataclass(frozen=True)
class File:
    """One file: its name in the package, with slashes, where it lies, and its bytes."""

    name: str
    path: Path
    bytes: int


@dataclass(frozen=True)
class Package:
    """What goes along from `root`, sorted by name.

    `links` were left out because they lead out of the folder, or to a folder. `own`: whether `root` itself
    holds newsbert_ray.
    """

    root: Path
    files: tuple[File, ...]
    links: tuple[str, ...]
    own: bool

    @property
    def bytes(self) -> int:
        """All files, as they lie on disk."""
        return sum(file.bytes for file in self.files)

    def holds(self, name: str) -> bool:
        """Whether the file or folder `name`, relative to the root, goes along."""
        return name in (".", "") or any(f.name == name or f.name.startswith(f"{name}/") for f in self.files)


@dataclass(frozen=True)
class _Rules:
    """Patterns that hold below `base` (a name that ends with a slash, or nothing)."""

    base: str
    spec: GitIgnoreSpec


def find_files(root: str | Path, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Package:
    """What of a folder goes along, and newsbert_ray with it where the folder does not hold it.

    The last pattern that fits decides: LEFT_OUT, then each .gitignore and .rayignore on the way down, then
    `include`, then `exclude`.

    Args:
        include: patterns, as in a .gitignore, of what goes along though it would be left out.
        exclude: patterns of what stays here.
    Raises:
        PackageError: no folder, a pattern that is none, more than MOST_FILES files.
    """
    root = Path(root).absolute()
    if not root.is_dir():
        raise PackageError(f"--working_dir {root}: no folder there")
    first = _Rules("", _spec(LEFT_OUT, "LEFT_OUT"))
    asked = [*(f"!{pattern}" for pattern in include), *exclude]
    last = _Rules("", _spec(asked, "--include and --exclude"))
    files: list[File] = []
    links: list[str] = []
    for file in _walk(root, "", [first], last, links):
        files.append(file)
        if len(files) > MOST_FILES:
            raise PackageError(_too_many(root, files))
    own = any(file.name == f"{_OWN}/__init__.py" for file in files)
    if not own:
        files += _own_files(first)
    return Package(root, tuple(sorted(files, key=lambda file: file.name)), tuple(sorted(links)), own)


def require_small(package: Package) -> None:
    """Refuse what Ray would refuse, before anything is packed or sent.

    Raises:
        PackageError: more than LIMIT_BYTES, with the largest folders.
    """
    if package.bytes <= LIMIT_BYTES:
        return
    sizes: Counter[str] = Counter()
    for file in package.files:
        sizes[_top(file.name)] += file.bytes
    largest = sizes.most_common(3)
    folders = ", ".join(f"{name} {format_size(size)}" for name, size in largest)
    raise PackageError(
        f"{package.root}: {format_size(package.bytes)} in {len(package.files):,} files is more than the "
        f"{format_size(LIMIT_BYTES)} that can be sent; largest: {folders}. Leave them here with "
        f"--exclude {largest[0][0]}, or put data into a bucket or on a shared disk and name it there"
    )


def write_archive(package: Package, path: str | Path) -> Path:
    """The package as a zip: the same files make the same bytes, so that Ray sends an unchanged one once.

    Raises:
        PackageError: a file that cannot be read, or has become larger than can be sent.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for file in package.files:
            entry = zipfile.ZipInfo(file.name, _SAME_TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            try:
                executable = file.path.stat().st_mode & stat.S_IXUSR
                entry.external_attr = (stat.S_IFREG | (0o755 if executable else 0o644)) << 16
                archive.writestr(entry, file.path.read_bytes())
            except (OSError, UnicodeEncodeError) as error:
                raise PackageError(
                    f"{str(file.path)!r}: cannot be sent ({error}); leave it here with --exclude PATTERN"
                ) from error
    written = Path(path)
    if written.stat().st_size > REQUEST_BYTES:
        raise PackageError(f"{package.root}: files grew while they were packed; run the same command again")
    return written


def _walk(root: Path, base: str, rules: list[_Rules], last: _Rules, links: list[str]) -> Iterator[File]:
    folder = root / base
    rules = [*rules, *_ignore_rules(folder, base)]
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise PackageError(
            f"{folder}: cannot be read ({error.strerror}); leave it here with --exclude {base}"
        ) from error
    for entry in entries:
        name = base + entry.name
        is_folder = entry.is_dir(follow_symlinks=False)
        if _is_left_out(f"{name}/" if is_folder else name, [*rules, last]):
            continue
        if is_folder:
            yield from _walk(root, f"{name}/", rules, last, links)
        elif entry.is_symlink() and not _stays_within(root, Path(entry.path)):
            links.append(name)
        elif entry.is_file():
            yield File(name, Path(entry.path), entry.stat().st_size)


def _stays_within(root: Path, link: Path) -> bool:
    """Whether a link leads to a file of the folder; another may be a secret, or half a disk."""
    target = link.resolve()
    return target.is_file() and target.is_relative_to(root.resolve())


def _is_left_out(name: str, rules: Sequence[_Rules]) -> bool:
    for rule in reversed(rules):
        decided = rule.spec.check_file(name.removeprefix(rule.base)).include
        if decided is not None:
            return decided
    return False


def _ignore_rules(folder: Path, base: str) -> Iterator[_Rules]:
    for name in _IGNORE_FILES:
        path = folder / name
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            yield _Rules(base, _spec(lines, str(path)))


def _spec(lines: Sequence[str], where: str) -> GitIgnoreSpec:
    try:
        return GitIgnoreSpec.from_lines(lines)
    except ValueError as error:
        raise PackageError(f"{where}: not a pattern of a .gitignore ({error})") from error


def _own_files(first: _Rules) -> Iterator[File]:
    """newsbert_ray as it is imported here, so that what runs there is what was checked here."""
    folder = Path(newsbert_ray.__file__).parent
    return _walk(folder.parent, f"{folder.name}/", [first], _Rules("", _spec((), "")), [])


def _top(name: str) -> str:
    return f"{name.partition('/')[0]}/" if "/" in name else name


def _too_many(root: Path, files: Sequence[File]) -> str:
    counts = Counter(_top(file.name) for file in files)
    folders = ", ".join(f"{name} {count:,}" for name, count in counts.most_common(3))
    return (
        f"{root}: more than {MOST_FILES:,} files, so far most in {folders}; go to the project's folder, or "
        f"leave some here with --exclude {counts.most_common(1)[0][0]}"
    )


ENVIRONMENT: Mapping[str, str] = {
    "PYTHONUNBUFFERED": "1",
    "TERM": "dumb",
    "COLUMNS": "110",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    # To stop is a Ctrl-C, on which a sweep ends tidily; who has not ended after that is killed.
    "RAY_JOB_STOP_SIGNAL": "SIGINT",
    "RAY_JOB_STOP_WAIT_TIME_S": "30",
}
"""Of every job: lines as they come, without cursor movements, wide enough for a table."""
HEAD: Mapping[str, float] = {"node:__internal_head__": 0.001}
"""What a job's own program occupies: the head, which is not taken away, and none of its CPUs."""
_PROGRAM = ("python", "-m", "newsbert_ray.cli")


@dataclass(frozen=True)
class Parcel:
    """What goes along: `folder` with what `include` and `exclude` say over the usual; variables; packages.

    `pip`: a file of requirements that the nodes install first; slow, and needless with an image.
    """

    folder: str = "."
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    pip: str | None = None


def read_variables(given: Sequence[str]) -> dict[str, str]:
    """{"NAME": "VALUE"} of NAME=VALUE words.

    Raises:
        SettingsError: a word that is none.
    """
    found = {}
    for word in given:
        name, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise SettingsError(f"--env {name}: expected NAME=VALUE")
        found[name] = value
    return found


def runtime_of(parcel: Parcel) -> dict[str, Any]:
    """Ray's runtime environment but for the working directory: variables, and what pip is to install.

    Ray itself is left out of the requirements: the cluster has its own.

    Raises:
        SettingsError: requirements that cannot be read.
    """
    variables = {"env_vars": {**ENVIRONMENT, **parcel.variables}}
    if parcel.pip is None:
        return variables
    try:
        lines = Path(parcel.pip).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--pip {parcel.pip}: no file of requirements ({error})") from error
    packages = [line.partition("#")[0].strip() for line in lines]
    kept = [name for name in packages if name and not re.match(r"ray\b(?!-)", name)]
    return {**variables, "pip": {"packages": kept, "pip_check": False}}


def entrypoint_of(command: Sequence[str]) -> str:
    """The command line that a cluster runs: newsbert_ray from the job's own folder."""
    return shlex.join([*_PROGRAM, *command])


def read_entrypoint(text: str) -> tuple[str, str | None]:
    """The verb of a job of ours and its --out, from its command line; an empty verb for another's job."""
    try:
        words = shlex.split(text)
    except ValueError:
        return "", None
    if tuple(words[:3]) != _PROGRAM or len(words) < 4:
        return "", None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--out" or word.startswith("--out="):
            return words[3], word.removeprefix("--out").removeprefix("=") or following or None
    return words[3], None


def job_name(given: str | None, command: Sequence[str]) -> str:
    """The job's name as given, or one of its verb and the time, such as newsbert-sweep-20261125-1231-ab12.

    Raises:
        SettingsError: no command, or a name that cannot be.
    """
    if not command:
        raise SettingsError("nothing to submit; write the verb after --, as in: -- sweep FILE --out s3://...")
    if given is not None:
        return checked_name(given)
    return f"newsbert-{command[0]}-{time.strftime('%Y%m%d-%H%M')}-{secrets.token_hex(2)}"


def checked_name(job: str) -> str:
    """`job`, which becomes a part of addresses and of file names on the head.

    Raises:
        SettingsError: a name that cannot be.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", job):
        raise SettingsError(f"{job!r} is no job's name; expected letters, digits, '-', '_' and '.'")
    return job


_READ = (
    "config",
    "space",
    "curves",
    "data",
    "source",
    "run",
    "folders",
    "input",
    "vectors",
    "behaviors",
    "teacher",
)
_WRITTEN = ("out", "submission")
_NAMES = ("teacher",)
"""What may be a name of Hugging Face's instead of a path."""
SHARED = "a URL such as s3://BUCKET/FOLDER, or an absolute path on a disk that all nodes share"


def check_reach(values: Mapping[str, Any], package: Package) -> list[str]:
    """Refuse what the cluster cannot see, and say what it must.

    Args:
        values: what the command names, by the setting's name: {"data": "shards", "out": "s3://..."}.
    Returns:
        Lines to show: absolute paths, which only a shared disk makes the same everywhere.
    Raises:
        SettingsError: a file or folder that is not sent, or a result that nobody would find.
    """
    absolute = []
    for name, path in _paths(values):
        if "://" in path:
            continue
        if PurePosixPath(path).is_absolute() or path.startswith("~"):
            absolute.append(f"{_flag(name)} {path}")
        elif name in _WRITTEN:
            raise SettingsError(
                f"{_flag(name)} {path}: would lie in the job's own folder on the cluster, which Ray removes; "
                f"give {SHARED}"
            )
        else:
            _require_sent(name, path, package)
    return [f"note: every node must see {', '.join(absolute)} at that path"] if absolute else []


def check_words(words: Sequence[str], variables: Mapping[str, str]) -> None:
    """Refuse secrets: Ray shows a job's words and variables to everybody who may look at the cluster.

    Raises:
        SettingsError: a password in a URL, or a variable that by its name is a secret.
    """
    cure = "give the nodes a role, or a secret of the cluster's own, instead"
    for word in words:
        if mask_url(word) != word:
            raise SettingsError(
                f"{mask_text(word)}: a secret in a job's command is shown to everybody; {cure}"
            )
    for name, value in variables.items():
        if is_secret_name(name) or mask_url(value) != value:
            raise SettingsError(
                f"--env {name}: a secret in a job's environment is shown to everybody; {cure}"
            )


def _paths(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in (*_READ, *_WRITTEN):
        given = values.get(name)
        for path in given if isinstance(given, list) else [given]:
            if isinstance(path, str):
                yield name, path


def _require_sent(name: str, path: str, package: Package) -> None:
    inside = os.path.normpath(path)
    if package.holds(inside):
        return
    there = (package.root / inside).exists()
    if name in _NAMES and not there:
        return
    if not there:
        raise SettingsError(f"{_flag(name)} {path}: not in {package.root}, which is sent; give {SHARED}")
    if inside.startswith(".."):
        raise SettingsError(f"{_flag(name)} {path}: outside of {package.root}, which is sent; give {SHARED}")
    raise SettingsError(
        f"{_flag(name)} {path}: the cluster cannot see it, it is not among the files that are sent; give "
        f"{SHARED}, or send it along with --include /{_pattern(package.root / inside, inside)}"
    )


def _pattern(path: Path, name: str) -> str:
    return f"{name}/" if path.is_dir() else name


def _flag(name: str) -> str:
    return {
        "space": "the search space",
        "run": "the run",
        "folders": "the folder",
        "vectors": "the vectors",
    }.get(name, f"--{name}")
