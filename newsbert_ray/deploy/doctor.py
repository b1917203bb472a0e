"""What the doctor says of one thing: that it is fit, that it is worth knowing, or what to mend and how."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException
from importlib import metadata
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.error import HTTPError
from urllib.parse import SplitResult, urlsplit
from urllib.request import Request, urlopen

from newsbert_ray.config import SCRATCH
from newsbert_ray.data.shards import SPLITS, Manifest, Part, Shard, ShardError, read_manifest
from newsbert_ray.deploy.job_client import ADDRESS_VARIABLE, is_loopback
from newsbert_ray.files import first_line
from newsbert_ray.methods import TASKS
from newsbert_ray.ray_private import VERSIONS_PROGRAM

State = Literal["ok", "note", "mend"]


class Finding(NamedTuple):
    """One line: its `topic` (versions, devices, ...), what was `found`, and the `cure`, always for `mend`."""

    topic: str
    state: State
    found: str
    cure: str = ""


class Topic:
    """Collects the findings of one topic, in order."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.findings: list[Finding] = []

    def ok(self, found: str) -> None:
        """Fit as it is."""
        self.findings.append(Finding(self._name, "ok", found))

    def note(self, found: str, cure: str = "") -> None:
        """Worth knowing; nothing fails for it."""
        self.findings.append(Finding(self._name, "note", found, cure))

    def mend(self, found: str, cure: str) -> None:
        """Something will fail or is open to others, until `cure`."""
        self.findings.append(Finding(self._name, "mend", found, cure))


class DoctorError(RuntimeError):
    """There is something to mend; the text says how much."""


def doctor(
    *,
    data: str | None = None,
    out: str | None = None,
    address: str | None = None,
    teacher: str | None = None,
    deep: bool = False,
) -> Iterator[Finding]:
    """Look at everything that a run needs, one finding after another; changes nothing.

    Args:
        data: folder of shards to look at.
        out: where results are to go, a folder or a URL; the folder at hand by default.
        address: the cluster, http(s)://HOST:PORT of its dashboard or HOST:PORT of its head; RAY_ADDRESS or
            RAY_API_SERVER_ADDRESS by default.
        teacher: the encoder that is to teach, a folder, a Hugging Face name or `scratch`.
        deep: compare each shard's hash too; reads them all.
    """
    named = (os.environ.get(name, "").strip() for name in ("RAY_ADDRESS", ADDRESS_VARIABLE))
    address = address or next((found for found in named if found), None)
    home, environment = Path.home(), dict(os.environ)
    yield from check_versions(Path(__file__).parents[2])
    yield from check_devices()
    yield from check_storage(out)
    yield from check_ports()
    yield from check_token(address, environment, home=home)
    yield from check_cluster(address, environment, home=home)
    if data is not None:
        yield from check_shards(data, deep=deep)
    if teacher is not None:
        yield from check_teacher(teacher, data)


ANSWER_SECONDS = 10.0


def check_token(address: str | None, environment: Mapping[str, str], *, home: Path) -> list[Finding]:
    """Whether this process would show a token to a cluster, and who else can read it.

    Args:
        address: the cluster's, if there is one to reach.
        home: of the user; Ray looks there for .ray/auth_token.
    """
    topic = Topic("token")
    mode = environment.get("RAY_AUTH_MODE", "").strip().lower()
    remote = address is not None and not is_loopback(_split(address).hostname or "")
    if mode != "token":
        said = f"RAY_AUTH_MODE is {mode}" if mode else "RAY_AUTH_MODE is not set"
        if remote:
            topic.mend(f"{said}: no token is shown to {address}", "export RAY_AUTH_MODE=token")
        else:
            topic.note(f"{said}: a private session makes a token of its own, a cluster is shown none")
    if "RAY_AUTH_TOKEN" in environment and mode == "token":
        if environment["RAY_AUTH_TOKEN"].strip():
            topic.ok("the token is in RAY_AUTH_TOKEN")
        else:
            topic.mend("RAY_AUTH_TOKEN is empty", "unset RAY_AUTH_TOKEN, or put the cluster's token into it")
        return topic.findings
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else home / ".ray/auth_token"
    if not path.is_file():
        if mode == "token" or named:
            topic.mend(
                f"{path}: no token there", f"copy the cluster's token there with mode 0600, or {NEW_TOKEN}"
            )
        return topic.findings
    _check_token_file(topic, path)
    return topic.findings


def check_cluster(address: str | None, environment: Mapping[str, str], *, home: Path) -> list[Finding]:
    """Whether the cluster at `address` answers, takes our token and has our versions.

    Args:
        address: http(s)://HOST:PORT of a dashboard, as to submit, or HOST:PORT of a head, as RAY_ADDRESS.
    """
    topic = Topic("cluster")
    if address is None or address == "local":
        topic.ok("none named (--address, RAY_ADDRESS, RAY_API_SERVER_ADDRESS): work stays on this machine")
        return topic.findings
    place = _split(address)
    try:
        host, port = place.hostname, place.port
    except ValueError:
        host, port = None, None
    web = place.scheme in ("http", "https")
    if not host or not (port or web):
        topic.mend(
            f"{address}: not an address", "give http://HOST:8265 (to submit) or HOST:6379 (RAY_ADDRESS)"
        )
        return topic.findings
    if place.scheme == "http" and not is_loopback(host):
        topic.mend(
            f"{address}: the token and the code go there unencrypted",
            f"ssh -L 8265:127.0.0.1:{port or 80} {host}, then --address http://127.0.0.1:8265; or https",
        )
    try:
        socket.create_connection((host, port or {"http": 80}.get(place.scheme, 443)), ANSWER_SECONDS).close()
    except OSError as error:
        topic.mend(
            f"{address}: nothing answers there ({error.strerror or error})",
            "start the cluster, correct the address, or open the tunnel to it",
        )
        return topic.findings
    ask = _ask_dashboard if web else _ask_head
    versions = ask(topic, address, environment, home)
    if versions is not None:
        _compare(topic, address, versions)
    return topic.findings


def _check_token_file(topic: Topic, path: Path) -> None:
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        topic.mend(f"{path}: other users of this machine may read it (mode {mode:04o})", f"chmod 600 {path}")
    elif not os.access(path, os.R_OK):
        topic.mend(f"{path}: cannot be read by this user", f"chown $USER {path}")
    elif not path.read_text(encoding="utf-8", errors="replace").strip():
        topic.mend(f"{path}: is empty", f"copy the cluster's token there, or {NEW_TOKEN}")
    else:
        topic.ok(f"{path}: there, for this user only")


def _ask_dashboard(
    topic: Topic, address: str, environment: Mapping[str, str], home: Path
) -> Mapping[str, str] | None:
    """{"ray_version": ...} of the cluster behind a dashboard; None where that ended in a finding."""
    token = _token(environment, home)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    url = f"{address.rstrip('/')}/api/version"
    try:
        with urlopen(Request(url, headers=headers), timeout=ANSWER_SECONDS) as answer:
            found: Mapping[str, str] = {"ray_version": json.loads(answer.read())["ray_version"]}
    except HTTPError as error:
        if error.code in (401, 403):
            _refused(topic, address, shown=bool(token))
        else:
            topic.mend(
                f"{address}: answers {error.code} to a question for its version", "is it Ray's dashboard?"
            )
        return None
    except (OSError, ValueError, KeyError, TypeError, HTTPException) as error:
        topic.mend(
            f"{address}: no Ray dashboard answers there ({error})", "give http://HOST:8265 of the head"
        )
        return None
    return found


def _ask_head(
    topic: Topic, address: str, environment: Mapping[str, str], home: Path
) -> Mapping[str, str] | None:
    """The same of the cluster behind a head, with its Python."""
    place = _split(address)
    command = [sys.executable, "-c", VERSIONS_PROGRAM, f"{place.hostname}:{place.port}"]
    variables = {**environment, "HOME": str(home), "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=2 * ANSWER_SECONDS
        )
    except subprocess.TimeoutExpired:
        topic.mend(
            f"{address}: something listens there, and no Ray head answers", "give HOST:6379 of the head"
        )
        return None
    if done.returncode == 0:
        found: Mapping[str, str] = json.loads(done.stdout.splitlines()[-1])
        return found
    if "AuthenticationError" in done.stderr or "InvalidAuthToken" in done.stderr:
        _refused(topic, address, shown=_token(environment, home) is not None)
    else:
        reason = next(iter(reversed(done.stderr.strip().splitlines())), f"exit code {done.returncode}")
        topic.mend(f"{address}: no Ray head answers there ({reason[:200]})", "give HOST:6379 of the head")
    return None


def _refused(topic: Topic, address: str, *, shown: bool) -> None:
    if shown:
        topic.mend(
            f"{address}: refuses our token", "copy the cluster's token to the file of RAY_AUTH_TOKEN_PATH"
        )
    else:
        topic.mend(
            f"{address}: asks for a token, and none is shown",
            "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=FILE, a file with the cluster's token",
        )


def _compare(topic: Topic, address: str, versions: Mapping[str, str]) -> None:
    """Ray refuses another Ray or another Python, down to its last number."""
    own = {"ray_version": metadata.version("ray"), "python_version": platform.python_version()}
    names = {"ray_version": "Ray", "python_version": "Python"}
    unlike = [name for name in own if name in versions and versions[name] != own[name]]
    for name in unlike:
        cure = (
            f"pip install ray=={versions[name]}" if name == "ray_version" else f"use Python {versions[name]}"
        )
        topic.mend(
            f"{address}: {names[name]} {versions[name]} there, {own[name]} here",
            f"{cure} here, or change it there",
        )
    if not unlike:
        said = ", ".join(f"{names[name]} {versions[name]}" for name in own if name in versions)
        topic.ok(f"{address} answers and lets us in: {said}")


def _token(environment: Mapping[str, str], home: Path) -> str | None:
    """The token that Ray would show, looked for where and as Ray does."""
    if environment.get("RAY_AUTH_MODE", "").lower() != "token":
        return None
    if text := environment.get("RAY_AUTH_TOKEN", "").strip():
        return text
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or home / ".ray/auth_token")
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _split(address: str) -> SplitResult:
    return urlsplit(address if "://" in address else f"//{address}")


WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_PREPARE = "newsbert-ray prepare ... --out {folder} --overwrite true"


def check_shards(data: str, *, deep: bool = False) -> list[Finding]:
    """Whether the shards in `data` are all there in the right sizes; with `deep`, byte for byte."""
    topic = Topic("shards")
    try:
        manifest = read_manifest(data)
    except (ShardError, OSError) as error:
        topic.mend(str(error), _PREPARE.format(folder=data))
        return topic.findings
    damaged = [
        f"{part.file} ({fault})" for part in _parts(manifest) if (fault := _fault(Path(data), part, deep))
    ]
    if not (Path(data) / "tokenizer/tokenizer.json").is_file():
        damaged.append("tokenizer/tokenizer.json (missing)")
    if damaged:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        topic.mend(f"{data}: {', '.join(damaged[:3])}{more}", _PREPARE.format(folder=data))
        return topic.findings
    counted = "; ".join(
        f"{task} " + ", ".join(f"{manifest.rows(split, task):,} {split}" for split in SPLITS)
        for task in TASKS
        if any(manifest.rows(split, task) for split in SPLITS)
    )
    how = "each hash is right" if deep else "each file is there in its size (--deep compares hashes)"
    topic.ok(f"{data}: {counted}; {how}")
    return topic.findings


def check_teacher(teacher: str, data: str | None) -> list[Finding]:
    """Whether `teacher` can be loaded without pickle or foreign code, and made the shards' tokens.

    Args:
        data: the shards; None compares nothing.
    """
    topic = Topic("teacher")
    if teacher == SCRATCH:
        topic.ok("scratch: a small encoder with random weights, nothing to fetch")
        return topic.findings
    folder = Path(teacher).expanduser()
    if folder.is_dir() and not _check_folder(topic, folder):
        return topic.findings
    from newsbert_ray.data.tokenizer import TokenizerError, load_tokenizer
    from newsbert_ray.model.assemble import check_tokenizer
    from newsbert_ray.model.encoder import EncoderError

    try:
        manifest = read_manifest(data) if data is not None else None
    except (ShardError, OSError):  # said under shards
        manifest = None
    try:
        if manifest is None:
            load_tokenizer(teacher)
            topic.ok(f"{teacher}: loads; not compared with shards (--data)")
        else:
            check_tokenizer(teacher, manifest)
            topic.ok(f"{teacher}: loads, and its tokeniser made the shards")
    except EncoderError as error:
        topic.mend(str(error), f"newsbert-ray prepare ... --teacher {teacher} --out ANOTHER")
    except TokenizerError as error:
        topic.mend(str(error), "give an encoder's folder, or fetch it where there is a network")
    return topic.findings


def _check_folder(topic: Topic, folder: Path) -> bool:
    """Whether a folder holds what an encoder is loaded from."""
    path = folder / "config.json"
    if not path.is_file():
        topic.mend(f"{folder}: no config.json there", "give a Hugging Face encoder's folder, or `scratch`")
        return False
    from transformers import AutoConfig

    try:
        kind = AutoConfig.from_pretrained(str(folder), trust_remote_code=False).model_type
        foreign = "auto_map" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        topic.mend(f"{path}: cannot be used ({reason[:200]})", "fetch the encoder's folder again")
        return False
    if foreign:
        topic.note(f"{folder}: brings Python files of its own; they are never run, only the usual {kind} is")
    if any((folder / name).is_file() for name in WEIGHTS):
        return True
    pickled = sorted(p.name for pattern in PICKLED for p in folder.glob(pattern))
    what = f"only pickled weights ({', '.join(pickled)}), which can run code" if pickled else "no weights"
    topic.mend(
        f"{folder}: {what}; model.safetensors is needed",
        "where you trust them, load them with transformers, then save_pretrained(FOLDER)",
    )
    return False


def _parts(manifest: Manifest) -> Iterator[Shard | Part]:
    for task in TASKS:
        for split in SPLITS:
            yield from manifest.shards(split, task)
    yield from manifest.others
    yield from (manifest.texts.tokens, manifest.texts.offsets)


def _fault(folder: Path, part: Shard | Part, deep: bool) -> str:
    """What is wrong with a file of the shards; nothing where nothing is."""
    path = folder / part.file
    try:
        size = path.stat().st_size
        if size != part.bytes:
            return f"{size:,} bytes instead of {part.bytes:,}"
        if not deep:
            return ""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return error.strerror or type(error).__name__
    return "" if digest == part.sha256 else "other bytes than were written"


DISTRIBUTION = "newsbert-ray"
IMPORTED = ("torch", "transformers", "ray", "pyarrow")
"""Packages with compiled parts, which can be installed and yet not load."""
LEAST_MEMORY, SCANT_MEMORY = 1 << 30, 4 << 30
"""Bytes: a run of a small encoder takes about one GB; a sweep takes it for each trial at once."""
LEAST_DISK, SCANT_DISK = 1 << 30, 10 << 30
"""Bytes: checkpoints of a BERT-size pair take 2 GB each."""
_GB = 1 << 30


def check_versions(checkout: Path) -> list[Finding]:
    """Python and packages against the lower bounds of our own metadata; where `checkout` holds a
    constraints.txt, also against what is pinned there."""
    topic = Topic("versions")
    try:
        own = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        topic.mend(
            f"{DISTRIBUTION} is not installed here, only its files", "pip install -c constraints.txt -e ."
        )
        return topic.findings
    least = str(own.metadata["Requires-Python"]).removeprefix(">=")
    python = ".".join(map(str, sys.version_info[:3]))
    if _numbers(python) < _numbers(least):
        topic.mend(f"Python {python}, {least} or newer is needed", f"make a new .venv with Python {least}")
    old = list(_too_old(own.requires or []))
    for name, version, wanted in old:
        found = f"{name} {version}" if version else f"{name} is not installed"
        topic.mend(f"{found}, {wanted} or newer is needed", f"pip install '{name}>={wanted}'")
    for name in IMPORTED:
        if name in [missing for missing, version, _ in old if not version]:
            continue
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken library raises whatever it likes
            topic.mend(
                f"{name} is installed and does not load ({first_line(error)})",
                f"pip install --force-reinstall --no-deps {name}=={metadata.version(name)}",
            )
    pinned = list(_unlike_pinned(checkout / "constraints.txt", own.requires or []))
    if pinned:
        topic.note(f"not the pinned versions: {', '.join(pinned)}", "pip install -c constraints.txt -e .")
    if not any(finding.state == "mend" for finding in topic.findings):
        names = ", ".join(f"{name} {metadata.version(name)}" for name in IMPORTED)
        topic.ok(f"Python {python}, {DISTRIBUTION} {own.version}, {names}")
    return topic.findings


def check_devices(root: Path = Path("/")) -> list[Finding]:
    """Cores, memory, GPUs and bf16, as a process of this machine or container may use them.

    Args:
        root: of the file system that says so (/proc, /sys, /dev).
    """
    topic = Topic("devices")
    _check_cores(topic, root)
    _check_memory(topic, root)
    _check_gpu(topic, root)
    return topic.findings


def check_storage(out: str | None) -> list[Finding]:
    """Whether results can be written to `out`, a folder (there or not yet) or a URL, and how much room is
    left there; without `out` to the folder at hand."""
    topic = Topic("storage")
    if out is not None and "://" in out:
        from newsbert_ray.storage.workdir import check_writable

        try:
            check_writable(out)
        except (ValueError, OSError) as error:
            topic.mend(str(error), "correct --out, the credentials of its storage, or its permissions")
        else:
            topic.ok(f"{out} can be written")
        return topic.findings
    folder = Path(out or ".").absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        topic.mend(f"{there} is a file, not a folder", "give another --out")
        return topic.findings
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".doctor-") as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        topic.mend(
            f"{there} cannot be written ({error.strerror})", f"give another --out, or: chmod u+w {there}"
        )
        return topic.findings
    free = shutil.disk_usage(there).free
    said = f"{there} can be written, {free / _GB:.1f} GB free"
    if free < LEAST_DISK:
        topic.mend(said, "make room there, or give another --out: a checkpoint takes up to 2 GB")
    elif free < SCANT_DISK:
        topic.note(f"{said}: enough for few checkpoints of a large encoder")
    else:
        topic.ok(said)
    return topic.findings


def _too_old(requires: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(name, installed version or nothing, least version) of what is below its bound."""
    for requirement in requires:
        found = re.match(r"([\w.-]+)(?:\[[^\]]*\])?>=([\d.]+)", requirement.replace(" ", ""))
        if found is None or "extra==" in requirement.replace(" ", ""):
            continue
        name, least = found.groups()
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = ""
        if not version or _numbers(version) < _numbers(least):
            yield name, version, least


def _unlike_pinned(path: Path, requires: Sequence[str]) -> Iterator[str]:
    """`torch 2.12.0 (pinned 2.13.0)` of each own requirement that is installed in another version."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    pins = {_plain(name): pin for name, equals, pin in (line.partition("==") for line in lines) if equals}
    for requirement in requires:
        name = re.split(r"[\s\[><=;]", requirement)[0]
        pin = pins.get(_plain(name))
        try:
            version = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
        if pin is not None and version != pin:
            yield f"{name} {version} (pinned {pin})"


def _check_cores(topic: Topic, root: Path) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = _cgroup_cores(root)
    if limit is not None and limit < cores:
        topic.note(
            f"{cores} cores are seen, this container may use {limit:g}: Ray and torch start too much",
            f"give --threads {max(1, int(limit))} to train, --concurrency {max(1, int(limit))} to sweep",
        )
    else:
        topic.ok(f"{cores} cores")


def _cgroup_cores(root: Path) -> float | None:
    """Cores that the container's quota comes to; None without one."""
    groups = root / "sys/fs/cgroup"
    words = _read(groups / "cpu.max").split()
    if not words:
        words = [_read(groups / f"cpu/cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    quota, period = [*words, "", ""][:2]
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _check_memory(topic: Topic, root: Path) -> None:
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"))
    available = int(found[1]) * 1024 if found else None
    groups = root / "sys/fs/cgroup"
    limit = _read(groups / "memory.max").strip() or _read(groups / "memory/memory.limit_in_bytes").strip()
    used = _read(groups / "memory.current").strip() or _read(groups / "memory/memory.usage_in_bytes").strip()
    if limit.isdigit() and used.isdigit():
        left = max(0, int(limit) - int(used))
        available = left if available is None else min(left, available)
    if available is None:
        topic.note("how much memory is free is not known here")
    elif available < LEAST_MEMORY:
        topic.mend(
            f"{available / _GB:.1f} GB of memory free: the first trial would be killed",
            "end other programs, or give the container more memory",
        )
    elif available < SCANT_MEMORY:
        topic.note(f"{available / _GB:.1f} GB of memory free: enough for one to three trials at once")
    else:
        topic.ok(f"{available / _GB:.1f} GB of memory free")


def _check_gpu(topic: Topic, root: Path) -> None:
    try:
        import torch
    except Exception:  # said under versions already
        return
    flags = _read(root / "proc/cpuinfo")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            bf16 = "with" if card.major >= 8 else "without"
            topic.ok(f"GPU {index}: {card.name}, {card.total_memory / _GB:.0f} GB, {bf16} bf16 in hardware")
        return
    card_there = any((root / "dev").glob("nvidia[0-9]*"))
    if card_there and torch.version.cuda is None:
        topic.mend(
            f"an NVIDIA GPU is here, torch {torch.__version__} was built without CUDA",
            "pip install --force-reinstall torch, without PIP_EXTRA_INDEX_URL set to PyTorch's CPU index",
        )
    elif card_there:
        topic.mend(
            f"an NVIDIA GPU is here, torch {torch.__version__} cannot use it",
            f"install a driver for CUDA {torch.version.cuda} (see nvidia-smi), or unset CUDA_VISIBLE_DEVICES",
        )
    else:
        bf16 = "with" if re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags) else "without"
        topic.ok(f"no GPU, the processor is used ({bf16} bf16 in hardware)")
    if torch.version.cuda is not None and not card_there:
        topic.note(
            "torch was built for CUDA and no GPU is visible: right for a cluster's head, else wasted room",
            "in a container: docker run --gpus all",
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13, 0)."""
    found = re.match(r"[\d.]*\d", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


NEW_TOKEN = "(umask 077; ray get-auth-token --generate > /dev/null)"
"""Writes ~/.ray/auth_token for its user alone; without the umask Ray lets everybody read it."""
PORTS: Mapping[int, tuple[str, str]] = {
    6379: ("a head's own", "--port"),
    8265: ("its dashboard's, for jobs", "--dashboard-port"),
    10001: ("Ray Client's", "--ray-client-server-port"),
}
"""Ray's usual ports: what listens there, and the option of `ray start` that takes another."""


def check_ports(root: Path = Path("/")) -> list[Finding]:
    """Ray's usual ports on this machine, and whether a head here can be reached from other machines.

    Args:
        root: of the file system that says so (/proc).
    """
    topic = Topic("ports")
    listening = _listeners(root / "proc/net")
    taken = sorted(PORTS.keys() & listening.keys())
    for port in taken:
        whose, option = PORTS[port]
        topic.note(
            f"port {port} ({whose}) is taken, at {', '.join(sorted(listening[port]))}",
            f"where a second head is to start here: ray start --head {option} ANOTHER",
        )
    if not taken:
        topic.ok(f"Ray's usual ports are free ({', '.join(map(str, PORTS))})")
    for port, variables in _heads(root / "proc"):
        outside = sorted(address for address in listening.get(port, ()) if not is_loopback(address))
        where = "a Ray head runs here" + (f", port {port}" if port else "")
        if not outside:
            topic.ok(f"{where}, on the loopback only")
        elif variables is None:
            topic.note(f"{where}, reachable from other machines; another user's: is a token asked for?")
        elif variables.get("RAY_AUTH_MODE", "").lower() == "token":
            topic.ok(f"{where}, reachable from other machines at {', '.join(outside)}, and asks for a token")
        else:
            topic.mend(
                f"{where}, reachable from other machines at {', '.join(outside)} and asks for no token: "
                "whoever reaches it runs programs as you",
                f"end that head; {NEW_TOKEN}; RAY_AUTH_MODE=token ray start --head ...",
            )
    return topic.findings


def _listeners(folder: Path) -> dict[int, set[str]]:
    """Port -> addresses on which some process of this machine listens for TCP."""
    found: dict[int, set[str]] = {}
    for table in ("tcp", "tcp6"):
        try:
            lines = (folder / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == "0A":
                address, _, port = fields[1].partition(":")
                found.setdefault(int(port, 16), set()).add(_address(address))
    return found


def _address(digits: str) -> str:
    """`0100007F` -> `127.0.0.1`: the kernel writes words of four bytes, each the wrong way round."""
    raw = bytes.fromhex(digits)
    found = ip_address(b"".join(raw[start : start + 4][::-1] for start in range(0, len(raw), 4)))
    return str(getattr(found, "ipv4_mapped", None) or found)


def _heads(folder: Path) -> Iterator[tuple[int, Mapping[str, str] | None]]:
    """Port and environment of each Ray head's central process on this machine; None for another user's."""
    for path in sorted(folder.glob("[0-9]*/cmdline")):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        port = re.search(r"--gcs_server_port=(\d+)", " ".join(words))
        if Path(words[0]).name != "gcs_server" or port is None:
            continue
        try:
            lines = path.with_name("environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            yield int(port[1]), None
            continue
        yield int(port[1]), dict(line.split("=", 1) for line in lines if "=" in line)
