"""What the command line prints: help, shell completion, and the results of the verbs."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from newsbert_ray.deploy.doctor import Finding
    from newsbert_ray.evaluation.evaluate import RankedImpression
    from newsbert_ray.evaluation.metrics import TopicRow
    from newsbert_ray.serving.embed import Answer
    from newsbert_ray.settings import Setting


_COMMON = {
    "--print_config": "Print all settings as YAML, and stop.",
    "--debug": "Show the Python traceback of an error.",
    "--help, --help-all": "Show the most used settings, or all of them.",
}


def overview(groups: Mapping[str, Mapping[str, str]]) -> str:
    """The verbs with a sentence each, by the title of their group."""
    lines = ["Distil a pretrained language model into a fast news encoder (NewsBERT).", ""]
    lines.append("Usage: newsbert-ray VERB [settings]")
    for title, sentences in groups.items():
        lines += ["", title]
        for verb, sentence in sentences.items():
            lines += _wrapped(sentence, indent=20, start=f"  {verb:<18}")
    lines += ["", "newsbert-ray VERB --help shows its settings. For completion with Tab:"]
    return "\n".join([*lines, '  eval "$(newsbert-ray --print_completion bash)"'])


def help_text(
    sentence: str, example: str, settings: Sequence[Setting], *, positionals: Sequence[str], grouped: bool
) -> str:
    """What a verb and each of its settings do; `positionals` (given without a flag) and required settings
    come first. With `grouped`, nested settings have a title."""
    together = re.sub(r"(--[\w.]+) (?!-)", "\\1\0", example)  # a flag and its value stay on one line
    command = " \\\n".join(_wrapped(together, indent=4, start="  ", width=78)).replace("\0", " ")
    lines = [*_wrapped(sentence), "", command]
    group = None
    order = {s.name: (s.name not in positionals, not s.required, grouped and "." in s.name) for s in settings}
    for setting in sorted(settings, key=lambda setting: order[setting.name]):
        if (name := setting.name.rpartition(".")[0] if grouped else "") != group:
            lines += ["", f"{name}:" if name else "Settings:"]
            group = name
        lines += _entry(setting, positional=setting.name in positionals)
    lines += ["", "Common:", *(f"  {name:<19} {text}" for name, text in _COMMON.items())]
    return "\n".join(lines)


def _entry(setting: Setting, *, positional: bool) -> list[str]:
    """The lines of one setting: its flag and value, its description and default."""
    choices = "|".join(setting.choices)
    value = choices if 0 < len(choices) <= 50 else setting.name.rpartition(".")[2].upper()
    flag = f"--[no-]{setting.name}" if setting.type is bool else f"--{setting.name} {value}"
    text = setting.text.rstrip(".") + "."
    text = text if re.match(r"\w+:", text) else text[:1].upper() + text[1:]
    if len(choices) > 50:
        text += f" One of {', '.join(setting.choices)}."
    if setting.required and not positional:
        text += " Required."
    if setting.default is not None and setting.default is not False and setting.default != ():
        default = setting.default if isinstance(setting.default, tuple) else (setting.default,)
        text += f" Default: {' '.join('on' if one is True else str(one) for one in default)}."
    name = (value if positional else flag) + (" ..." if setting.is_list else "")
    return [f"  {name}", *_wrapped(text, indent=6)]


def _wrapped(text: str, *, indent: int = 0, start: str | None = None, width: int = 100) -> list[str]:
    pad = " " * indent
    return textwrap.wrap(
        text,
        min(width, shutil.get_terminal_size().columns),
        initial_indent=pad if start is None else start,
        subsequent_indent=pad,
        break_long_words=False,
        break_on_hyphens=False,
    )


def completion(shell: str, flags: Mapping[str, Sequence[Setting]]) -> str:
    """A script for `shell` (bash or zsh) that completes verbs, flags and choices, otherwise file names."""
    names, choices = list[str](), list[str]()
    for verb, settings in flags.items():
        words = " ".join(f"--{setting.name}" for setting in settings)
        names.append(f'{verb}) words="{words} --help --help-all --debug" ;;')
        choices += [f'{verb}:--{s.name}) words="{" ".join(s.choices)}" ;;' for s in settings if s.choices]
    script = [
        "_newsbert_ray() {",
        'local word="${COMP_WORDS[COMP_CWORD]}" verb="${COMP_WORDS[1]}" words=""',
        f'if [ "$COMP_CWORD" = 1 ]; then words="{" ".join(flags)} --help --version"',
        'elif [[ "$word" == --* ]]; then case "$verb" in',
        *names,
        'esac; else case "$verb:${COMP_WORDS[COMP_CWORD-1]}" in',
        *choices,
        "esac; fi",
        'COMPREPLY=($(compgen -W "$words" -- "$word"))',
        "}",
        "complete -o default -F _newsbert_ray newsbert-ray",
    ]
    return "\n".join(["autoload -U +X bashcompinit && bashcompinit"] * (shell == "zsh") + script)


class VerbError(RuntimeError):
    """A verb that finished and whose result is a failure; the text is a complete message."""


def print_result(verb: str, result: Any, values: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what the function of `verb` returned, as text or as JSON. VerbError: trials of a sweep failed, or
    the doctor found a problem."""
    if verb == "sweep":
        failed = f"{len(result.failures)} trials failed" if result.best else "no trial finished"
        if not result.best or result.failures:
            raise VerbError(f"{values['out']}: {failed}; the reasons are above")
    elif verb == "doctor":
        print_findings(result, as_json=as_json)
    elif as_json:
        print(_json(result.matches if verb == "similar" else result))
    elif verb == "evaluate" and values.get("show") is not None:
        print_impressions(result, model=values.get("model", "student"))
    elif verb == "evaluate":
        (print_topics if values.get("by_topic") else print_metrics)(result)
    elif verb == "similar":
        print_answer(result)
    elif verb == "bench":
        from newsbert_ray.serving.bench import SPARE, timings_table

        table = timings_table(result)
        print_rows(table.head, table.rows, right=table.head[table.words :], spare=SPARE)
        if values.get("out"):
            print(f"bench.md, bench.json and the figure are in {values['out']}")
    else:
        print("\n".join(map(str, result)))
        if verb == "export":
            print(f"{result[0]} says how to load it")


def _json(result: Any) -> str:
    """A mapping, or rows that are dataclasses or named tuples, as JSON."""
    if not isinstance(result, dict):
        result = [row._asdict() if hasattr(row, "_asdict") else dataclasses.asdict(row) for row in result]
    return json.dumps(result, indent=1)


def print_findings(findings: Iterable[Finding], *, as_json: bool) -> None:
    """A line for each finding of the doctor as it is made; VerbError if something needs fixing."""
    from rich.console import Console
    from rich.text import Text

    styles, kept = {"ok": "green", "note": "yellow", "fix": "bold red"}, []
    for finding in findings:
        kept.append(finding)
        if as_json:
            continue
        state, label = finding.state, "cure: " if finding.state == "fix" else ""
        line = Text.assemble((f"{state:<5}", styles[state]), f"{finding.topic:<9} {finding.message}")
        if finding.cure:
            line.append(f"\n{'':<15}{label}{finding.cure}")
        Console().print(line, soft_wrap=True)
    if as_json:
        print(_json(kept))
    if problems := sum(finding.state == "fix" for finding in kept):
        raise VerbError(f"{problems} problem{'s' if problems > 1 else ''}; each has its cure")


def print_metrics(metrics: Mapping[str, Any]) -> None:
    """A row for each model, a column for each metric with its standard error, and the rest below."""
    from newsbert_ray.methods import HEADINGS

    def number(numbers: Mapping[str, float], name: str) -> str:
        error = f" ±{numbers[f'{name}_error']:.4f}" if f"{name}_error" in numbers else ""
        return f"{numbers[name]:.4f}{error}" if name in numbers else ""

    models = {name: value for name, value in metrics.items() if isinstance(value, dict)}
    submission = models.pop("submission", None)
    names = list(dict.fromkeys(name for numbers in models.values() for name in numbers if name in HEADINGS))
    if models:
        rows = [(model, *(number(numbers, name) for name in names)) for model, numbers in models.items()]
        head = [HEADINGS[name] for name in names]
        print_rows(("model", *head), rows, right=head)
        counts = next(iter(models.values()))
        left_out = f", {counts['left_out']:.0f} left out" if "left_out" in counts else ""
        if "rows" in counts:
            print(f"{counts['rows']:.0f} rows evaluated{left_out}")
        if any(f"{name}_error" in numbers for numbers in models.values() for name in names):
            print("± is the standard error of the mean over the evaluated rows")
    else:
        print("no metrics: the split has no labels")
    print(*(f"{name} {value}" for name, value in metrics.items() if not isinstance(value, dict)), sep="\n")
    if submission:
        lines, model = submission["lines"], submission["model"]
        print(f"{submission['file']}: {lines:,} impressions as the {model} ranks them.")
        if unknown := submission.get("unknown_candidates"):
            print(f"{unknown:,} candidates without a known title are ranked last.")
        print("The file was read back and has a line for every impression.")


def print_impressions(impressions: Sequence[RankedImpression], *, model: str) -> None:
    """A user's impressions: the history, then the candidates in the model's order."""
    clicks = {True: "clicked", False: "", None: "unknown"}
    ranked_head = ("rank", "score", "clicked", f"candidates, ranked by the {model}", "category")
    for one in impressions:
        print(f"user {one.user_id}, impression {one.impression_id}, {one.time}")
        if one.history:
            head = (f"history ({len(one.history)}, newest last)", "category")
            print_rows(head, [(news.title, news.category) for news in one.history])
        else:
            print("no history: ranked as for a new user")
        rows = [
            (str(rank), f"{offer.score:.3f}", clicks[offer.clicked], offer.news.title, offer.news.category)
            for rank, offer in enumerate(one.offers, 1)
        ]
        styles = {index: "green" for index, offer in enumerate(one.offers) if offer.clicked}
        print_rows(ranked_head, rows, right=("rank", "score"), styles=styles)


def print_answer(answer: Answer) -> None:
    """The query, and the most similar texts with their scores."""
    print(answer.question)
    for text in answer.query[-5:]:
        print("\n".join(_wrapped(text, indent=2)))
    if len(answer.query) > 5:
        print(f"  (the last 5 of {len(answer.query)})")
    rows = [(f"{match.score:.3f}", match.name, match.text) for match in answer.matches]
    print_rows(("score", "id", "text"), rows, right=("score",))


def print_topics(rows: Sequence[TopicRow]) -> None:
    """A row for each topic, in per cent."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f}"

    head = ("topic", "titles", "predicted", "precision", "recall", "F1", "most often taken for")
    cells = []
    for row in rows:
        shares = map(percent, (row.precision, row.recall, row.f1))
        cells.append((row.topic, f"{row.titles:,}", f"{row.predicted:,}", *shares, row.taken_for or ""))
    print_rows(head, cells, right=head[1:-1], spare=("predicted", head[-1]))
    mean = 100 * sum(row.f1 for row in rows) / len(rows)
    print(f"per cent; macro-F1 {mean:.1f}, the mean of {len(rows)} topics' F1")


def print_rows(head: Sequence[str], rows: Iterable[Sequence[str]], **options: Any) -> None:
    """A table; `options` as for `terminal_table`."""
    from rich.console import Console

    from newsbert_ray.reporting.tables import terminal_table

    Console().print(terminal_table(head, rows, **options))
