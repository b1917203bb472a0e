"""The tables and figures of the study of students, from search_spaces/results/student.jsonl.

`python -m tests.study_tables` draws the figures again; `readme_numbers` puts the tables into the pages.
`keep RECORDS ...` writes student.jsonl from the records.jsonl files of `tests.benchmarks.study_student`,
`student_base.jsonl RECORDS ...` that file.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from newsbert_ray.files import write_text
from newsbert_ray.reporting.draw import write_figure
from newsbert_ray.reporting.figures import FigureData, Line, Panel
from newsbert_ray.reporting.page import Table
from newsbert_ray.reporting.records import NAMES
from newsbert_ray.reporting.statistics import LEVEL

RESULTS = Path(__file__).parents[1] / "search_spaces" / "results"
RECORDS, SPEEDS = RESULTS / "student.jsonl", RESULTS / "student_speed.json"
BASE_SPEEDS = RESULTS / "student_base_speed.json"
SIZES = (1000, 4000, 12000, None)
SEEDS = range(5)
ORDER = ("linear", "finetune", "twinbert", "tinybert", "disjoint", "newsbert", "newsbert_warm")
ABLATIONS = ("no_momentum", "no_soft_labels", "no_hidden")
PAPER = ("finetune", "twinbert", "tinybert", "disjoint", *ABLATIONS)
"""What the paper finds worse than NewsBERT."""
RECIPE = "best"
_NOT_CHANGES = ("evaluate_every", "batch_size", "steps", "student_learning_rate", "top_learning_rate")
"""Settings that a table of variants shows in columns of their own, or not at all."""
_FINAL = ("main", "layers", "linear", "teachers")
"""Stages whose runs are results; the others choose a rate or look at a variant."""

Record = Mapping[str, Any]
Key = tuple[Any, ...]


class Test(NamedTuple):
    """Paired comparison over seeds, in points: mean difference, its p (two-sided t-test), number of pairs."""

    mean: float
    p: float
    pairs: int

    @property
    def verdict(self) -> str:
        """In words, at the paper's level."""
        if self.p >= LEVEL or self.pairs < 2:
            return "cannot be told"
        return "holds" if self.mean > 0 else "does not hold"


def read_records(path: Path = RECORDS) -> list[Record]:
    """The kept lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def by_seed(
    records: Iterable[Record], method: str, labels: int | None, layers: int, *, unlabelled: bool = True
) -> dict[int, Record]:
    """A method's final runs at an amount of labels, by seed; without those of tuning and of variants. Of
    runs that differ in their length only, the best on validation counts. The linear model of all labels has
    no chance in it: its one run counts for every seed."""
    runs = {
        record["seed"]: record
        for record in sorted(records, key=lambda record: record["validation"]["accuracy"])
        if (record["method"], record["labels"], record["layers"]) == (method, labels, layers)
        and record["stage"] in _FINAL
        and not _varies(record)
        and record["unlabelled"] == unlabelled
    }
    if (method, labels) == ("linear", None):
        return {seed: run for seed in SEEDS for run in runs.values()}
    return runs


def _varies(record: Record) -> bool:
    """Whether it is not the method as it is, its length apart."""
    return not record["values"].keys() <= {"steps", "evaluate_every", "batch_size"}


def _sizes(records: Sequence[Record]) -> list[int | None]:
    """Amounts of labels at which a student was trained."""
    known = {record["labels"] for record in records}
    return [labels for labels in SIZES if labels in known]


def compare(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Test | None:
    """Paired t-test over the seeds of both, in points; p is 1 for one seed, None without any."""
    from scipy.stats import ttest_rel  # type: ignore[import-untyped]

    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    differences = [100 * (ours[seed] - theirs[seed]) for seed in seeds]
    if len(set(differences)) == 1:
        return Test(differences[0], 0.0 if differences[0] and len(seeds) > 1 else 1.0, len(seeds))
    p = float(ttest_rel([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]).pvalue)
    return Test(statistics.fmean(differences), p, len(seeds))


def accuracies(runs: Mapping[int, Record], what: str = "test", metric: str = "accuracy") -> dict[int, float]:
    """A metric by seed; `what` is test, validation, teacher_test or teacher_validation."""
    return {seed: record[what][metric] for seed, record in runs.items() if record.get(what)}


class System(NamedTuple):
    """A method at a depth, with or without unlabelled text; a row of a table."""

    method: str
    layers: int
    unlabelled: bool

    @property
    def name(self) -> str:
        """As tables show it."""
        alone = ", labelled text only" if not self.unlabelled else ""
        return name_of(self.method) + alone

    @property
    def depth(self) -> str:
        """Its layers."""
        return "" if self.method == "linear" else str(self.layers)


def systems(records: Sequence[Record]) -> list[System]:
    """What has final runs, in the order of the tables."""
    order = [*ORDER, RECIPE, *ABLATIONS, "teacher"]
    known = {
        System(r["method"], r["layers"], r["unlabelled"])
        for r in records
        if r["stage"] in _FINAL and not _varies(r)
    }
    return sorted(known, key=lambda one: (order.index(one.method), one.layers, one.unlabelled))


def accuracy_table(records: Sequence[Record]) -> Table:
    """A row for each system, accuracy and macro-F1 of the test split at each amount of labels."""
    sizes = _sizes(records)
    rows = []
    for one in systems(records):
        runs = [by_seed(records, one.method, n, one.layers, unlabelled=one.unlabelled) for n in sizes]
        rows.append((one.name, one.depth, *(_cell(list(seeds.values())) for seeds in runs)))
    head = ("method", "layers", *(f"{size_name(labels)} labels" for labels in sizes))
    caption = (
        "Accuracy % / macro-F1 % on the test split, mean ± sd of accuracy over seeds; in brackets the number "
        "of seeds where it is not 5."
    )
    return Table(head, tuple(rows), words=2, caption=caption)


def against_table(records: Sequence[Record]) -> Table:
    """The difference of every system to fine-tuning one layer, paired over seeds."""
    base, sizes, rows = "finetune", _sizes(records), []
    for one in systems(records):
        cells = []
        for labels in sizes:
            ours = accuracies(by_seed(records, one.method, labels, one.layers, unlabelled=one.unlabelled))
            cells.append(_difference(ours, accuracies(by_seed(records, base, labels, 1))))
        if any(cells) and (one.method, one.layers) != (base, 1):
            rows.append((one.name, one.depth, *cells))
    head = ("method", "layers", *(f"{size_name(labels)} labels" for labels in sizes))
    caption = "Points of test accuracy above fine-tuning one layer; p of a paired t-test over seeds."
    return Table(head, tuple(rows), words=2, caption=caption)


def orderings_table(records: Sequence[Record]) -> Table:
    """Whether each ordering of the paper holds at each amount of labels and in few updates, N = 1."""
    methods = ("newsbert", *PAPER)
    columns = {
        f"{size_name(n)} labels": {m: accuracies(by_seed(records, m, n, 1)) for m in methods} for n in SIZES
    }
    short = [record for record in records if record["stage"] == "short"]
    columns["1,000 labels, few updates"] = {
        m: accuracies({record["seed"]: record for record in short if record["method"] == m}) for m in methods
    }
    columns = {head: values for head, values in columns.items() if values["newsbert"]}
    rows = []
    for method in PAPER:
        cells = [_test_cell(compare(values["newsbert"], values[method])) for values in columns.values()]
        if any(cells):
            rows.append((f"NewsBERT above {name_of(method)}", *cells))
    caption = (
        f"Difference in points of accuracy, p (paired t-test over seeds), and the verdict at p < {LEVEL}."
    )
    return Table(("ordering of the paper", *columns), tuple(rows), words=1, caption=caption)


def short_table(records: Sequence[Record]) -> Table:
    """All methods in the same few updates at 1,000 labels."""
    runs: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record["stage"] == "short":
            runs[record["method"]].append(record)
    rows = [
        (
            name_of(method),
            _cell(own),
            f"{own[0]['rate']:g}",
            f"{min(r['seconds'] for r in own):,.0f}",
        )
        for method, own in sorted(runs.items(), key=lambda item: -_mean_accuracy(item[1]))
    ]
    caption = (
        "One layer, 1,000 labels, equal numbers of updates; the number of seeds in brackets. Seconds of "
        "the fastest run on a busy core, without those of a teacher that was finished before."
    )
    return Table(
        ("method", "accuracy % / macro-F1 %", "learning rate", "seconds"), tuple(rows), 1, caption=caption
    )


def _mean_accuracy(runs: Sequence[Record]) -> float:
    return statistics.fmean(run["test"]["accuracy"] for run in runs)


def base_table(records: Sequence[Record], speeds: Path = BASE_SPEEDS) -> Table:
    """The paper's shape: quality and measured speed-up of each student."""
    speed = measured_speeds("titles_per_second", speeds)
    (teacher,) = (record for record in records if record["method"] == "teacher")
    whole = teacher["test"]["accuracy"]
    rows = []
    for run in sorted(records, key=lambda run: (run["layers"], run["test"]["accuracy"])):
        name = f"{run['layers']}-layer teacher" if run is teacher else name_of(run["method"])
        accuracy, f1 = (f"{100 * run['test'][metric]:.1f}" for metric in ("accuracy", "macro_f1"))
        rate = speed[str(run["layers"])]
        times = f"{rate / speed[str(teacher['layers'])]:.1f}"
        kept = f"{run['test']['accuracy'] / whole:.1%}"
        rows.append((name, str(run["layers"]), accuracy, f1, kept, f"{rate:,.0f}", times))
    head = ("method", "layers", "accuracy %", "macro-F1 %", "of the teacher", "titles/s", "times")
    caption = f"MPNet's first {teacher['layers']} layers as teacher, 1,000 labels, one seed."
    return Table(head, tuple(rows), words=1, caption=caption)


def goals_table(records: Sequence[Record]) -> Table:
    """What the study was to reach, and what it reached."""
    rows = []
    for labels, points, share in ((1000, 4.0, 0.99), (12000, 2.5, 0.995)):
        best, plain = (by_seed(records, m, labels, 1) for m in (RECIPE, "finetune"))
        gain = compare(accuracies(best), {s: v + points / 100 for s, v in accuracies(plain).items()})
        rows.append(_goal(f"{size_name(labels)} labels: {points} points above fine-tuning", gain, points))
        teacher = {s: share * v for s, v in accuracies(best, "teacher_test").items()}
        kept = compare(accuracies(best), teacher)
        mean = _share(best)
        rows.append(_goal(f"{size_name(labels)} labels: keeps {share:.1%} of its teacher", kept, 0.0, mean))
    linear = accuracies(by_seed(records, "linear", None, 0))
    ours = accuracies(by_seed(records, RECIPE, None, 1))
    above = compare(ours, {seed: value + 0.02 for seed, value in linear.items()})
    rows.append(_goal("all labels: 2 points above the linear model", above, 2.0))
    for labels in SIZES[:2]:
        words, line = (accuracies(by_seed(records, m, labels, 0)) for m in (RECIPE, "linear"))
        rows.append(
            _goal(f"{size_name(labels)} labels: N = 0 above the linear model", compare(words, line), 0.0)
        )
    head = ("goal", "measured", "p", "reached")
    caption = f"Reached: the goal lies below what was measured at p < {LEVEL} (one-sided, paired over seeds)."
    return Table(head, tuple(rows), words=1, caption=caption)


def variants_table(records: Sequence[Record]) -> Table:
    """Changes to a method, and what they gave on validation and test."""
    groups: dict[Key, list[Record]] = defaultdict(list)
    for record in records:
        if record["stage"] == "variants":
            changes = tuple(sorted(record["values"].items()))
            key = (record["method"], record["labels"], record["layers"], record["unlabelled"], record["rate"])
            groups[(*key, changes)].append(record)
    rows = []
    for (method, labels, layers, unlabelled, rate, changes), runs in groups.items():
        words = [f"{name} {value}" for name, value in changes if not name.endswith(_NOT_CHANGES)]
        change = ", ".join([*words, *([] if unlabelled else ["no unlabelled text"])])
        means = (
            statistics.fmean(100 * run[split]["accuracy"] for run in runs) for split in ("validation", "test")
        )
        cells = (f"{rate:g}", f"{runs[0]['steps']:,}", *(f"{mean:.1f}" for mean in means), str(len(runs)))
        rows.append(
            (f"{name_of(method)}, {layers} layer{'s' * (layers != 1)}", size_name(labels), change, *cells)
        )
    head = ("method", "labels", "change", "learning rate", "updates", "validation %", "test %", "seeds")
    caption = "Accuracy of variants; the choice among them is made on validation."
    return Table(head, tuple(sorted(rows, key=lambda row: -float(row[5]))), words=3, caption=caption)


def regime_table(records: Sequence[Record]) -> Table:
    """Momentum at low learning rates: accuracy by beta and by what beta mixes."""
    groups: dict[Key, list[Record]] = defaultdict(list)
    for record in records:
        if record["stage"] == "regime":
            form = record["values"].get("distill.momentum", "gradient")
            groups[record["rate"], record["values"]["distill.beta"], form].append(record)
    forms = sorted({key[1:] for key in groups}, key=lambda key: (key[1] != "gradient", key))
    rows = [
        (f"{rate:g}", *(_cell(groups.get((rate, *form), []), f1=False, usual=1) for form in forms))
        for rate in sorted({key[0] for key in groups})
    ]
    names = (f"beta {beta:g}{'' if form == 'gradient' else f', {form}'}" for beta, form in forms)
    steps = sorted({run["steps"] for runs in groups.values() for run in runs})
    caption = (
        "NewsBERT, N = 1, 12,000 labels, one rate for all models, "
        f"{' or '.join(f'{n:,}' for n in steps)} updates: test accuracy %."
    )
    return Table(("learning rate", *names), tuple(rows), words=0, caption=caption)


def rates_table(records: Sequence[Record]) -> Table:
    """The default method for two epochs: validation accuracy by the rates of student and teacher."""
    groups: dict[Key, Record] = {}
    for record in records:
        if record["stage"] == "rates":
            values, rate = record["values"], record["rate"]
            teacher = values["optimizer.teacher_learning_rate"] or rate
            groups[record["labels"], values.get("optimizer.decay", "linear"), teacher, rate] = record
    rates = sorted({key[3] for key in groups})
    rows = []
    for labels, decay, teacher in sorted(
        {key[:3] for key in groups}, key=lambda key: (key[0], key[1] != "none", key[2])
    ):
        runs = [groups.get((labels, decay, teacher, rate)) for rate in rates]
        rows.append((f"{labels:,}", decay, f"{teacher:g}", *(_both(run) if run else "" for run in runs)))
    head = ("titles", "decay", "teacher's rate", *(f"{rate:g}" for rate in rates))
    caption = (
        "NewsBERT, student of 2 layers, two epochs of batches of 32, one seed: validation accuracy % of "
        "student / teacher by the learning rate of student and top."
    )
    return Table(head, tuple(rows), words=2, caption=caption)


def _both(run: Record) -> str:
    """Validation accuracies of student and teacher."""
    both = run["validation"], run["teacher_validation"]
    return " / ".join(f"{100 * scores['accuracy']:.1f}" for scores in both)


TABLES: Mapping[str, Callable[[Sequence[Record]], Table]] = {
    "accuracy": accuracy_table,
    "against": against_table,
    "orderings": orderings_table,
    "short": short_table,
    "goals": goals_table,
    "variants": variants_table,
    "regime": regime_table,
    "rates": rates_table,
}


def study(name: str, path: Path = RECORDS) -> str:
    """A table by its name in TABLES, or `base`, `headline`, `gain` or `setup`, as Markdown."""
    records = read_records(path)
    sentences = {"headline": headline, "gain": gain, "setup": setup}
    if name in sentences:
        return sentences[name](records)
    return (base_table if name == "base" else TABLES[name])(records).markdown()


def headline(records: Sequence[Record]) -> str:
    """What the recipe gives at 1,000 labels, over the seeds that all of its numbers have."""
    keys = ((RECIPE, 1000, 1), ("finetune", 1000, 1), (RECIPE, 1000, 0))
    best, plain, words = (accuracies(by_seed(records, *key)) for key in keys)
    seeds = set(best) & set(plain) & set(words)
    ours, theirs, averaged = (statistics.fmean(one[seed] for seed in seeds) for one in (best, plain, words))
    alone = accuracies(by_seed(records, RECIPE, 1000, 1), "teacher_test")
    teacher = statistics.fmean(alone[seed] for seed in seeds)
    times = measured_speeds("reached")
    return (
        f"**With 1,000 labelled titles, a student of one layer trained by `--method {RECIPE}` classifies "
        f"{ours:.1%} of unseen titles\ncorrectly: {100 * (ours - theirs):.1f} points more than the same "
        f"student fine-tuned, and {ours / teacher:.1%} of its 6-layer teacher,\nwhich takes {times['1']:.1f} "
        f"times as long. A student without layers reaches {averaged:.1%} and is {times['0']:.0f} times as "
        f"fast\nas the teacher** (MIND titles, means of {len(seeds)} seeds, one CPU core)."
    )


def gain(records: Sequence[Record]) -> str:
    """What the recipe adds at each amount of labels, over the seeds that both methods have."""
    above = {"finetune": 1, "linear": 0}
    points: dict[str, dict[int | None, float]] = {name: {} for name in above}
    counts = set()
    for (name, layers), labels in itertools.product(above.items(), SIZES):
        ours, theirs = (accuracies(by_seed(records, one, labels, layers)) for one in (RECIPE, name))
        if seeds := set(ours) & set(theirs):
            points[name][labels] = 100 * statistics.fmean(ours[seed] - theirs[seed] for seed in seeds)
            counts.add(len(seeds))
    plain, linear = (
        [f"{value:+.1f} with {size_name(labels)}" for labels, value in points[name].items()] for name in above
    )
    return (
        f"With the other titles as texts without labels, a one-layer student of `--method {RECIPE}` differs "
        f"from a fine-tuned one\nby {', '.join(plain)} labels (percentage points of accuracy). A student "
        f"without layers differs from a\nlinear model by {', '.join(linear)}. These are means of "
        f"{min(counts)} to {max(counts)} seeds."
    )


def setup(records: Sequence[Record]) -> str:
    """How long students and teachers learned, and at which rates."""
    lengths: dict[str, set[str]] = defaultdict(set)
    rates: dict[str, set[str]] = defaultdict(set)
    for one in systems(records):
        for labels in SIZES:
            for run in by_seed(records, one.method, labels, one.layers, unlabelled=one.unlabelled).values():
                if one.method == "teacher":
                    lengths["teachers"].add(f"{run['steps']:,} at {size_name(labels)} labels")
                elif one.method != "linear":
                    who = "students" if labels else "students with all labels"
                    lengths[who].add(f"{run['steps']:,}")
                    layers = f"{one.layers} layer{'s' * (one.layers != 1)}"
                    rates[f"{name_of(one.method)} ({layers})"].add(f"{run['rate']:g}")
    many = [f"{who} {' or '.join(sorted(counts))}" for who, counts in sorted(lengths.items())]
    own = [f"{who} {' or '.join(sorted(values))}" for who, values in rates.items()]
    return f"Updates: {'; '.join(many)}. Learning rates: {', '.join(own)}."


def learning_curve(records: Sequence[Record]) -> FigureData[Panel]:
    """Accuracy over labels, one line a method; where some have several sizes, single points are left out."""
    most = max((r["labels"] or 0 for r in records), default=0)
    total = max(40120, most)
    curves = {}
    for one in systems(records):
        points = [
            (labels or total, by_seed(records, one.method, labels, one.layers, unlabelled=one.unlabelled))
            for labels in SIZES
        ]
        curves[one] = [(x, [100 * v for v in accuracies(runs).values()]) for x, runs in points if runs]
    least = min(2, max(map(len, curves.values()), default=0))  # a single point is no curve; the table has it
    lines = []
    for one, known in curves.items():
        if len(known) >= least:
            label = one.name if not one.depth or one.method == "teacher" else f"{one.name}, N = {one.layers}"
            lines.append(_line(label, known, "reference" if one.method == "teacher" else "mean"))
    panel = Panel("", "labelled titles", "test accuracy %", tuple(lines), log_x=True)
    caption = (
        "Students, the linear model and the teacher; mean and sd over seeds, points moved apart a little."
    )
    alt = "Test accuracy over labelled titles, a line for each method"
    return FigureData("student_learning_curve", (panel,), caption, alt=alt, wide=True)


def quality_speed(
    records: Sequence[Record], speeds: Mapping[str, float], labels: int = 1000
) -> FigureData[Panel]:
    """Accuracy over measured titles/s; a dot for each depth, and the linear model."""
    lines = []
    for method in ("finetune", RECIPE):
        known = []
        for layers in (0, 1, 2, 3):
            values = [100 * v for v in accuracies(by_seed(records, method, labels, layers)).values()]
            if values and f"{layers}" in speeds:
                known.append((speeds[f"{layers}"], values))
        if known:
            lines.append(_line(name_of(method), sorted(known), "mean"))
    for method, layers, speed in (("teacher", 6, "6"), ("linear", 0, "linear")):
        values = [100 * v for v in accuracies(by_seed(records, method, labels, layers)).values()]
        if values and speed in speeds:
            lines.append(_line(name_of(method), [(speeds[speed], values)], "mean"))
    panel = Panel("", "titles/s on one CPU core", "test accuracy %", tuple(lines), log_x=True)
    caption = (
        f"{labels:,} labels; dots from right to left: more and more layers, from 0. Tokenising included."
    )
    alt = (
        "Test accuracy over titles per second of students of 0 to 3 layers, the teacher and the linear model"
    )
    return FigureData("student_quality_speed", (panel,), caption, alt=alt, wide=True)


def keep(paths: Sequence[Path], target: Path = RECORDS) -> None:
    """Write the records of several files, the last line of each name, without what no table needs."""
    lines: dict[str, Record] = {}
    for path in paths:
        for record in read_records(path):
            kept = {k: v for k, v in record.items() if k not in ("settings", "parts", "texts_per_second")}
            kept["stage"] = {"var": "variants"}.get(record["stage"], record["stage"])
            lines[record["name"]] = kept
    text = "".join(json.dumps(record, separators=(",", ":")) + "\n" for _, record in sorted(lines.items()))
    write_text(target, text)


def measured_speeds(field: str = "titles_per_second", path: Path = SPEEDS) -> dict[str, float]:
    """Titles/s by number of layers, and of the linear model; `reached`: times those of the deepest."""
    timings = json.loads(path.read_text(encoding="utf-8"))["timings"]
    names = ["linear" if "linear" in timing["name"] else str(timing["layers"]) for timing in timings]
    return {n: timing[field] for n, timing in zip(names, timings, strict=True)}


def draw(records: Sequence[Record], folder: Path = RESULTS) -> None:
    """The figures, as PNG."""
    figures = [learning_curve(records)]
    figures.append(quality_speed(records, measured_speeds()))
    for figure in figures:
        _, svg = write_figure(figure, folder)
        svg.unlink()


def name_of(method: str) -> str:
    """A method as tables show it."""
    return {"teacher": "6-layer teacher"}.get(method) or NAMES.get(method, method)


def size_name(labels: int | None) -> str:
    """1,000, or all."""
    return "all" if labels is None else f"{labels:,}"


def _cell(runs: Sequence[Record], *, f1: bool = True, usual: int = 5) -> str:
    if not runs:
        return ""
    accuracy, macro = ([100 * run["test"][name] for run in runs] for name in ("accuracy", "macro_f1"))
    spread = f" ± {statistics.stdev(accuracy):.1f}" if len(runs) > 1 else ""
    count = f" ({len(runs)})" if len(runs) != usual else ""
    second = f" / {statistics.fmean(macro):.1f}" if f1 else ""
    return f"{statistics.fmean(accuracy):.1f}{spread}{second}{count}"


def _difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    """Points between the same seeds, with p where there are several."""
    test = compare(ours, theirs)
    if test is None:
        return ""
    return f"{test.mean:+.1f} ({'1 seed' if test.pairs == 1 else f'p {test.p:.1g}, {test.pairs} seeds'})"


def _test_cell(test: Test | None) -> str:
    if test is None:
        return ""
    return f"{test.mean:+.1f}, {'1 seed' if test.pairs == 1 else f'p {test.p:.1g}'}: {test.verdict}"


def _share(runs: Mapping[int, Record]) -> str:
    shares = [
        r["test"]["accuracy"] / r["teacher_test"]["accuracy"] for r in runs.values() if r["teacher_test"]
    ]
    return f"{statistics.fmean(shares):.1%}" if shares else ""


def _goal(name: str, test: Test | None, points: float, measured: str = "") -> tuple[str, ...]:
    if test is None:
        return (name, "not measured", "", "cannot be told")
    shown = measured or f"{test.mean + points:+.1f} points"
    if test.pairs == 1:
        return (name, shown, "", f"{'yes' if test.mean > 0 else 'no'}, of one seed: cannot be told")
    p = test.p / 2 if test.mean > 0 else 1 - test.p / 2
    reached = "yes" if p < LEVEL else "yes in the mean, but not at this level" if test.mean > 0 else "no"
    return (name, shown, f"{p:.1g}", reached)


def _line(label: str, points: Sequence[tuple[float, Sequence[float]]], look: Any) -> Line:
    x = tuple(float(x) for x, _ in points)
    means = tuple(statistics.fmean(values) for _, values in points)
    sd = tuple(statistics.stdev(values) if len(values) > 1 else None for _, values in points)
    return Line(label, x, means, sd, tuple(len(values) for _, values in points), look=look)


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[1] == "keep":
        keep([Path(name) for name in sys.argv[2:]])
    elif len(sys.argv) > 2:
        keep([Path(name) for name in sys.argv[2:]], RESULTS / sys.argv[1])
    draw(read_records())
