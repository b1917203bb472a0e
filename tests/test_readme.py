"""What the README and the Makefile tell people to type is understood, and what they name is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from newsbert_ray.config import PrepareSettings, TrainSettings, dotted_names
from newsbert_ray.flags import values_from
from newsbert_ray.verbs import VERBS
from tests.readme_numbers import BLOCK, PAGES, RESULTS, filled

ROOT = Path(__file__).parents[1]
README, MEASURED = (page.read_text(encoding="utf-8") for page in PAGES)
BOTH = README + MEASURED
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def _typed() -> list[list[str]]:
    """The words of every command line in the README's shell blocks and the Makefile's recipes."""
    blocks = re.findall(r"```sh\n(.*?)```", BOTH, flags=re.DOTALL)
    recipes = re.findall(r"^\t(.+)$", MAKEFILE, flags=re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()] + recipes
    inline = re.findall(r"`(newsbert-ray [^`]+)`", BOTH)
    return [shlex.split(line, comments=True) for line in [*lines, *inline] if "newsbert-ray " in line]


COMMANDS = [words for words in _typed() if words[0].endswith("newsbert-ray")]


@pytest.mark.parametrize("words", COMMANDS, ids=[f"{n} {words[1]}" for n, words in enumerate(COMMANDS)])
def test_command_is_understood(words: list[str]) -> None:
    """A command copied from the README must not end in `unknown setting`."""
    _, verb, *rest = words
    assert verb in VERBS
    if rest and rest != ["--help"]:
        values_from(verb, rest)


@pytest.mark.parametrize("page", [README, MEASURED], ids=["README", "results"])
def test_tables_are_what_the_kept_records_make(page: str) -> None:
    """A number typed by hand, or one that an older program made, is no measurement; after a change of the
    report's form: python -m tests.readme_numbers."""
    assert BLOCK.findall(page)
    assert filled(page) == page


def test_links_lead_somewhere() -> None:
    """To files of the repository, and to headings of the page of measurements."""
    headings = re.findall(r"^#+ (.+)$", MEASURED, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for page, text in zip(PAGES, (README, MEASURED), strict=True):
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            place, _, anchor = link.partition("#")
            assert not place or (page.parent / place).exists(), link
            assert not anchor or anchor in anchors, link


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json*")), ids=lambda path: path.name)
def test_kept_records_are_small_and_tell_no_place(path: Path) -> None:
    """Kept files are for the numbers alone."""
    text = path.read_text(encoding="utf-8")
    assert len(text) < 500_000
    assert not re.search(r"/(?:tmp|root|home|work|Users)/", text)


def test_commands_were_found() -> None:
    """A README written in another form would make the test above test nothing."""
    assert {"prepare", "train", "sweep", "evaluate", "report", "synthesize"} <= {
        words[1] for words in COMMANDS
    }


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"(?:`|^)make ([a-z]+)", README, flags=re.MULTILINE)))
)
def test_make_target_is_there(target: str) -> None:
    """`make demo` is the first thing that anybody types."""
    assert re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE)


PATHS = sorted(set(re.findall(r"(?<![\w/.])\w[\w/-]*/[\w-]+\.(?:py|yaml)", BOTH + MAKEFILE)))


@pytest.mark.parametrize("path", PATHS)
def test_named_file_is_there(path: str) -> None:
    """A table that points at a moved file sends its reader away."""
    assert (ROOT / path).exists()


def test_named_settings_exist() -> None:
    """The table from the paper to the code is only worth its accuracy."""
    known = {*dotted_names(TrainSettings), *dotted_names(PrepareSettings)}
    groups = {name.rpartition(".")[0] for name in known}
    table = README.partition("## From the paper to the code")[2].partition("##")[0]
    cells = [line.split("|")[2] for line in table.splitlines() if line.startswith("|")][2:]
    named = {name for cell in cells for name in re.findall(r"`([\w.]+)`", cell)}
    assert named
    assert named <= known | groups


def test_readme_opens_with_the_two_commands() -> None:
    """Everything else can be looked up; these two must be seen at once."""
    first = README.partition("```sh\n")[2].partition("```")[0].splitlines()
    assert [line.split()[:2] for line in first] == [["make", "demo"], ["make", "test"]]
