"""The working directory as it goes to a cluster: which files, how large, in one zip. Knows no Ray."""

from __future__ import annotations

import os
import stat
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

import newsbert_ray

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
    folders = ", ".join(f"{name} {size_text(size)}" for name, size in largest)
    raise PackageError(
        f"{package.root}: {size_text(package.bytes)} in {len(package.files):,} files is more than the "
        f"{size_text(LIMIT_BYTES)} that can be sent; largest: {folders}. Leave them here with "
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


def size_text(count: float) -> str:
    """Bytes for a person: 1.9 MB."""
    return f"{count / 1e3:.1f} kB" if count < 1e5 else f"{count / 1e6:,.1f} MB"


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
