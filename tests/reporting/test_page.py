"""One document, said twice."""

from __future__ import annotations

from newsbert_ray.reporting.page import (
    Bullets,
    Command,
    Facts,
    Page,
    Picture,
    Section,
    Table,
    Text,
    to_markdown,
)


def test_markdown_by_hand() -> None:
    """What people paste into an issue must be Markdown that every viewer shows."""
    page = Page(
        "Sweep x",
        "The best has β = 0.1.",
        (
            Section(
                "Best",
                (
                    Text("One line."),
                    Facts((("sampler", "TPE"), ("seeds", "0, 1"))),
                    Command("newsbert-ray train --out 'a b'"),
                    Table(("trial", "value"), (("a", "1"), ("b", "2")), caption="Both"),
                    Bullets(("first", "second")),
                    Picture("f.png", "<svg/>", "a line that rises", "Caption."),
                ),
            ),
        ),
    )
    assert (
        to_markdown(page)
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


def test_text_stays_what_it_is() -> None:
    """An error message with a tag, a bar or a star in it must not become one."""
    page = Page("x", "<nan> a|b *c* `d` [e](f) _g_ macro_f1\nend", ())
    assert "\\<nan> a\\|b \\*c\\* \\`d\\` \\[e\\](f) \\_g\\_ macro_f1 end" in to_markdown(page)
