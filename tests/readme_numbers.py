"""The README's tables, made from the records that the repository keeps: `python -m tests.readme_numbers`
writes them anew, `tests/test_readme.py` asks whether they still stand there.

A table stands between `<!-- FILE: WHICH -->` and `<!-- end -->`: a file of search_spaces/results, and how the
caption of one of its report's tables begins.
"""

from __future__ import annotations

import re
from pathlib import Path

from newsbert_ray.reporting.kept import read_kept
from newsbert_ray.reporting.page import Table, block_markdown
from newsbert_ray.reporting.runs_page import runs_page

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "search_spaces" / "results"
BLOCK = re.compile(r"(<!-- (\S+\.jsonl): ([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """`text` with each table as its records make it now."""
    return BLOCK.sub(lambda found: f"{found[1]}{_table(found[2], found[3])}\n{found[4]}", text)


def _table(file: str, which: str) -> str:
    page = runs_page(read_kept(RESULTS / file), {})
    tables = [block for section in page.sections for block in section.blocks if isinstance(block, Table)]
    wanted = "" if which == "results" else which
    found = [table for table in tables if (table.caption.startswith(wanted) if wanted else not table.caption)]
    if len(found) != 1:
        raise ValueError(f"{file}: {len(found)} tables whose caption begins with {which!r}")
    return block_markdown(found[0])


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8")
