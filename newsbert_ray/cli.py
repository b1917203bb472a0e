"""newsbert-ray VERB: parse, call one function of the package, print. Each verb loads only what it needs."""

from __future__ import annotations

import difflib
import errno
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from newsbert_ray.verbs import VERBS


def main(argv: list[str] | None = None) -> int:
    """Run one verb.

    Returns:
        The exit code: 0 done, 1 failed, 2 a command that cannot be, 130 stopped by Ctrl-C; of a submitted
        job its own.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)  # behind it stand a submitted job's words
    words, sent = words[:cut], words[cut:]
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words:
        print(_overview(), file=sys.stderr)
        return 2
    if words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        from newsbert_ray import __version__

        print(f"newsbert-ray {__version__}")
        return 0
    name, *rest = words
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f", did you mean '{near[0]}'?" if near else f"; one of {', '.join(VERBS)}"
        print(f"newsbert-ray: unknown verb '{name}'{hint}", file=sys.stderr)
        return 2
    if "--help" in rest or "-h" in rest:
        _print_help(name)
        return 0
    return _run(name, [*rest, *sent], debug=debug)


def _run(name: str, words: list[str], *, debug: bool) -> int:
    """The verb's exit code; what it raises becomes one message, with `debug` its frames."""
    _configure_logging(debug=debug)
    try:
        code = VERBS[name].run(words)
        sys.stdout.flush()
    except KeyboardInterrupt:
        again = _GO_ON.get(name, "the same command")
        print(f"\nnewsbert-ray {name}: stopped; {again} goes on where it was", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        failure, message = _describe(error)
        hint = f" (every setting: newsbert-ray {name} --help)" if failure == 2 else ""
        print(f"newsbert-ray {name}: {message}{hint}", file=sys.stderr)
        return failure
    return code or 0


def _describe(error: BaseException) -> tuple[int, str]:
    """Exit code and message: our own errors and the system's as they are, the rest as ours to mend."""
    from newsbert_ray.config import SettingsError
    from newsbert_ray.flags import UsageError

    for cause in _causes(error):
        if isinstance(cause, UsageError | SettingsError):
            return 2, str(cause)
        if type(cause).__module__.startswith("newsbert_ray."):
            return 1, str(cause)
    if isinstance(error, OSError):
        return 1, _describe_system(error)
    first = next(iter(str(error).splitlines()), "")
    return 1, f"internal error: {type(error).__name__}: {first}; run it again with --debug for the frames"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and those below it; of Ray's wrappers only what they wrap, their text is a whole trace."""
    current: BaseException | None = error
    for _ in range(10):
        if current is None:
            return
        below = getattr(current, "cause", None)
        if not isinstance(below, BaseException):
            yield current
            below = current.__cause__
        current = below


def _describe_system(error: OSError) -> str:
    if error.errno is None:
        return " ".join(str(error).split())
    where = f"{error.filename}: " if error.filename else ""
    cure = "; free some space and run the same command again" if error.errno == errno.ENOSPC else ""
    return f"{where}{error.strerror}{cure}"


def _configure_logging(*, debug: bool) -> None:
    """Our own lines plain on stderr; the libraries speak only of trouble, and not at all in progress bars."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("newsbert_ray").setLevel(logging.DEBUG if debug else logging.INFO)
    if debug:
        return
    warnings.simplefilter("ignore")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


_GO_ON = {"sweep": "the same command with --resume"}

_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
}


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.sentence}" for name, verb in VERBS.items())
    return (
        "Distil a pretrained language model into a fast news encoder (NewsBERT), and sweep for the best.\n"
        f"\nusage: newsbert-ray VERB [settings] [--debug]\n\n{verbs}\n\n"
        "newsbert-ray VERB --help lists the verb's settings; --debug shows the frames behind an error."
    )


def _print_help(name: str) -> None:
    from newsbert_ray.flags import help_text

    print(f"{VERBS[name].sentence}\n\n  {VERBS[name].example}\n\n{help_text(name)}", end="")


if __name__ == "__main__":
    sys.exit(main())
