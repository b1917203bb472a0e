"""A page as Markdown, HTML and LaTeX."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest

from newsbert_ray.reporting.draw import draw_svg
from newsbert_ray.reporting.figures import Bar, Bars, FigureData, Line, Panel
from newsbert_ray.reporting.page import (
    Command,
    Page,
    Picture,
    Section,
    Table,
)
from tests.reporting.conftest import BROWSER, open_pages


def test_markdown_by_hand() -> None:
    """The Markdown must display in every common viewer."""
    page = Page(
        "Sweep x",
        "The best has β = 0.1.",
        (
            Section(
                "Best",
                (
                    "One line.",
                    {"sampler": "TPE", "seeds": "0, 1"},
                    Command("newsbert-ray train --out 'a b'"),
                    Table(("trial", "value"), (("a", "1"), ("b", "2")), caption="Both"),
                    ["first", "second"],
                    Picture("f.png", "<svg/>", "a line that rises", "Caption."),
                ),
            ),
        ),
    )
    assert (
        page.markdown()
        == """\
# Sweep x

The best has β = 0.1.

## Best

One line.

- sampler: TPE
- seeds: 0, 1

```sh
newsbert-ray train --out 'a b'
```

Both

| trial | value |
| --- | ---: |
| a | 1 |
| b | 2 |

- first
- second

![a line that rises](f.png)
"""
    )


def test_special_characters_are_escaped() -> None:
    """An error message with a tag, a bar or a star must be shown as it is."""
    page = Page("x", "<nan> a|b *c* `d` [e](f) _g_ macro_f1\nend", ())
    assert "\\<nan> a\\|b \\*c\\* \\`d\\` \\[e\\](f) \\_g\\_ macro_f1 end" in page.markdown()


VOID = {"meta", "br", "link", "img", "hr"}


class _Reader(HTMLParser):
    """Reads a page: its text, its attributes; fails where a tag is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of every element called `tag`."""
        return [attributes for name, attributes in self.found if name == tag]


def _svg(name: str) -> str:
    line = Line("a", (0.0, 1.0), (1.0, 2.0), (0.1, None), (2, 1))
    return draw_svg(FigureData(name, (Panel("", "x", "y", (line,)),), "Caption."))


@cache
def _page() -> Page:
    bars = draw_svg(FigureData("bars", (Bars("", "share", (Bar("a", 1.0),)),), "Caption.", wide=True))
    blocks = (
        "a < b & c",
        {"sampler": "TPE"},
        Command("newsbert-ray train --out '<x>'"),
        Table(("trial", "value"), (("<script>alert(1)</script>", "1"),), caption="Failures"),
        ["first"],
        Picture("lines.png", _svg("lines"), 'rises to "2"', "Lines & so on."),
        Picture("bars.png", bars, "a bar", "Bars."),
    )
    return Page("Sweep <x>", "The best.", (Section("Best", blocks), Section("Cost", ("None.",))))


def test_page_is_well_formed_and_self_contained() -> None:
    """A page that loads a font or a script fails offline and contacts a server."""
    text = _page().html()
    reader = _Reader(text)
    names = {name for name, _ in reader.found}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert "@import" not in text
    assert "default-src 'none'" in text
    for _, attributes in reader.found:
        for key, value in attributes.items():
            if key in ("href", "xlink:href", "src"):
                assert value is not None
                assert value.startswith("#")
            assert not key.startswith("on")
    assert not re.search(r"url\((?!#)", text)


def test_text_never_becomes_markup() -> None:
    """The reason of a failure is foreign text and may contain a tag."""
    reader = _Reader(_page().html())
    assert reader.all("script") == []
    assert "<script>alert(1)</script>" in reader.words
    assert any(attributes.get("aria-label") == 'rises to "2"' for attributes in reader.all("svg"))


def test_ids_are_unique() -> None:
    """Two drawings with equal ids would use each other's glyphs and clip paths."""
    reader = _Reader(_page().html())
    ids = [attributes["id"] for _, attributes in reader.found if attributes.get("id")]
    assert len(ids) == len(set(ids)) > 20
    used = {
        value.removeprefix("#")
        for _, attributes in reader.found
        for key, value in attributes.items()
        if value and key in ("href", "xlink:href", "aria-labelledby")
    }
    assert used <= set(ids)


def test_page_is_accessible() -> None:
    """Headings in order, a language, a text for each figure, heads for each column."""
    reader = _Reader(_page().html())
    assert reader.all("html") == [{"lang": "en"}]
    headings = [name for name, _ in reader.found if re.fullmatch("h[1-6]", name)]
    assert headings == ["h1", "h2", "h2"]
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in reader.all("svg"))
    assert all(head["scope"] == "col" for head in reader.all("th"))
    assert len(reader.all("figcaption")) == len(reader.all("figure")) == 2


def test_markdown_and_html_agree() -> None:
    """Both forms contain the same texts."""
    page = _page()
    words = "".join(_Reader(page.html()).words)
    markdown = page.markdown().replace("\\", "")
    for text in ("Sweep <x>", "The best.", "a < b & c", "TPE", "newsbert-ray train --out '<x>'", "Failures"):
        assert text in words
        assert text in markdown


def test_drawing_has_no_fixed_size(tmp_path: Path) -> None:
    """A drawing with a size in points would not fit a telephone's screen."""
    svg = Picture("a.png", _svg("a"), "b\\1", "").inline
    opening = svg[: svg.index(">")]
    assert "viewBox=" in opening
    assert "width=" not in opening
    assert 'aria-label="b\\1"' in opening
    assert "<metadata>" not in svg
    assert "<?xml" not in svg


def test_latex_is_escaped() -> None:
    """A per cent sign would comment out the rest of its line; an underscore is an error."""
    table = Table(
        ("student_layers", "accuracy %"),
        (("N & 1", "71.2 ± 0.3"), ("a\\b{}~^", "< 1")),
        words=1,
        caption="50 % of $5",
    )
    page = Page("Report", "lead", (Section("Results", ("no table", table)),))
    assert page.latex().splitlines()[2:] == [
        r"\begin{table}",
        r"\centering",
        r"\caption{50 \% of \$5}",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"student\_layers & accuracy \% \\",
        r"\midrule",
        r"N \& 1 & 71.2 $\pm$ 0.3 \\",
        r"a\textbackslash{}b\{\}\textasciitilde{}\textasciicircum{} & \textless{} 1 \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_fits_a_browser(tmp_path: Path, dark: bool) -> None:
    """At 390 and 1280 pixels nothing but a table scrolls sideways, and every figure is drawn."""
    wide = Table(
        tuple(f"column {i}" for i in range(30)), (("12.3 ± 0.4",) * 30,), caption="A wide table. " * 9
    )
    page = replace(_page(), sections=(*_page().sections, Section("Wide", (wide,))))
    assert open_pages([page.html()], tmp_path, dark=dark) == [[0, 2], [0, 2]]
