"""What the figures of runs show."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from newsbert_ray.methods import METHODS
from newsbert_ray.record import RunRecord
from newsbert_ray.reporting.figures import (
    PREREQUISITE,
    Line,
    NothingToDraw,
    beta_figure,
    blocks_figure,
    curve_figure,
    loss_figure,
    method_figure,
    quality_figure,
    runs_figures,
)
from newsbert_ray.reporting.sweep_data import read_sweep
from newsbert_ray.reporting.sweep_figures import best_at_each_depth
from tests.reporting.conftest import MakeRecord, MakeSweep


def _grid(make_record: MakeRecord) -> list[RunRecord]:
    return [
        make_record(
            accuracy=0.6 + 0.1 * depth + beta + 0.02 * seed,
            teacher_accuracy=0.9,
            seed=seed,
            **{"distill.beta": beta, "student.layers": depth},
        )
        for seed in (0, 1)
        for beta in (0.1, 0.0)
        for depth in (2, 1)
    ]


def test_beta_figure_by_hand(make_record: MakeRecord) -> None:
    """A line for each depth, points in order of beta, mean and spread over seeds in per cent (Fig. 7)."""
    figure = beta_figure(_grid(make_record))
    accuracy, f1 = figure.panels
    one, two, teacher = accuracy.lines
    assert (one.label, two.label) == ("N = 1", "N = 2")
    assert one.x == (0.0, 0.1)
    assert one.y == pytest.approx((71.0, 81.0))
    assert one.sd == pytest.approx((2**0.5, 2**0.5))
    assert one.n == (2, 2)
    assert two.y == pytest.approx((81.0, 91.0))
    assert teacher.look == "reference"
    assert teacher.y == pytest.approx((90.0, 90.0))
    assert accuracy.y_label == "test accuracy (%)"
    assert f1.y_label == "test macro-F1 (%)"


def test_order_of_records_does_not_matter(make_record: MakeRecord) -> None:
    """The same runs in another order give the same figure, with the same colours."""
    records = _grid(make_record)
    assert beta_figure(records) == beta_figure(records[::-1])
    assert curve_figure(records) == curve_figure(records[::-1])


def test_caption_names_data_teacher_and_seeds(make_record: MakeRecord) -> None:
    """A curve without its data and n cannot be judged."""
    caption = beta_figure(_grid(make_record)).caption
    assert "synthetic_train (ab12cd34), 1,800 train / 400 test titles" in caption
    assert "Teacher: scratch. 8 runs, mean ± sd over 2 seeds per point. N: student layers." in caption


def test_caption_does_not_promise_error_bars_for_one_seed(make_record: MakeRecord) -> None:
    """`mean ± sd` over single runs would be wrong."""
    records = [make_record(seed=seed, **{"distill.beta": beta}) for seed, beta in enumerate((0.0, 0.1))]
    figure = beta_figure(records)
    assert "one seed per point" in figure.caption
    assert figure.panels[0].lines[0].sd == (None, None)
    assert [line.label for line in figure.panels[0].lines] == ["N = 2", "teacher (mean)"]


def test_other_settings_are_never_averaged_over(make_record: MakeRecord) -> None:
    """Averaging over two temperatures would show an effect of beta that does not exist."""
    records = [
        make_record(**{"distill.beta": beta, "distill.temperature": t}) for beta in (0, 0.1) for t in (1, 2)
    ]
    labels = [line.label for line in beta_figure(records).panels[0].lines]
    assert labels == ["t = 1", "t = 2"]


def _at_two_depths(*methods: str) -> list[dict[str, Any]]:
    return [{"method": method, "student.layers": layers} for method in methods for layers in (1, 2)]


def _over(values: Iterable[float], **settings: Any) -> list[dict[str, Any]]:
    return [{"distill.beta": value, **settings} for value in values]


UNLABELLED = _over((0.0, 0.2), task="recommendation", labelled=False)
LEFT_OUT: list[tuple[Callable[..., Any], list[dict[str, Any]], str]] = [
    (beta_figure, [{"seed": 0}, {"seed": 1}], "beta does not vary"),
    (
        beta_figure,
        [run for t in range(12) for run in _over((0, 0.1), **{"distill.temperature": 1 + t})],
        r"distill\.temperature make 12 lines, 8 can be told apart",
    ),
    (beta_figure, UNLABELLED, "no run has test metrics"),
    (curve_figure, [{"epochs": 1}], "no run has two evaluations"),
    (
        method_figure,
        [*_at_two_depths("finetune", "newsbert"), {"method": "newsbert", "learning_rate": 1e-3}],
        "not just the method and the depth vary",
    ),
    (method_figure, _at_two_depths(*list(METHODS)[:9]), "9 lines, 8 can be told apart"),
    (blocks_figure, [{}], "no teacher learned with its student"),
]


@pytest.mark.parametrize(("make", "runs", "reason"), LEFT_OUT)
def test_left_out_figures_say_why(
    make_record: MakeRecord, make: Callable[..., Any], runs: list[dict[str, Any]], reason: str
) -> None:
    """Empty axes, a lone dot, twelve lines or a mean over other settings would mislead a reader."""
    with pytest.raises(NothingToDraw, match=reason):
        make([make_record(**run) for run in runs])


def test_curves_by_hand(make_record: MakeRecord) -> None:
    """A panel for each depth, validation accuracy in per cent at each epoch."""
    records = [
        make_record(accuracy=0.8, teacher_accuracy=0.9, epochs=2, seed=s, **{"student.layers": 1})
        for s in (0, 1)
    ]
    (panel,) = curve_figure(records).panels
    assert panel.title == "N = 1"
    assert panel.lines[0] == Line("student", (1.0, 2.0), (40.0, 80.0), n=(2, 2))
    assert panel.lines[1].look == "reference"
    assert panel.lines[1].y == (45.0, 90.0)


def test_curves_show_the_best_and_count_the_others(make_record: MakeRecord) -> None:
    """A reader must see that lines were left out."""
    records = [make_record(accuracy=0.5 + i / 100, **{"distill.beta": i / 100}) for i in range(11)]
    figure = curve_figure(records)
    shown = [line.label for line in figure.panels[0].lines if line.look == "mean"]
    assert shown == [f"β = {i / 100:g}" for i in range(3, 11)]
    assert figure.caption.endswith("3 settings that ended lower are not drawn.")


def test_recommendation_draws_its_own_metrics(make_record: MakeRecord) -> None:
    """Fig. 7's right half: AUC first, each metric on axes that name it."""
    records = [
        make_record(task="recommendation", auc=0.6 + beta, teacher_auc=0.7, **{"distill.beta": beta})
        for beta in (0.0, 0.1)
    ]
    figure = beta_figure(records)
    assert [panel.y_label for panel in figure.panels] == [
        f"test {heading} (%)" for heading in ("AUC", "MRR", "nDCG@5", "nDCG@10")
    ]
    line, teacher = figure.panels[0].lines
    assert line.y == pytest.approx((60.0, 70.0))
    assert teacher.look == "reference"
    assert teacher.y == pytest.approx((70.0, 70.0))
    assert "1,800 clicks of train / 400 impressions of test." in figure.caption
    (panel,) = curve_figure(records).panels
    assert panel.y_label == "validation AUC (%)"


def test_tasks_are_never_drawn_together(make_record: MakeRecord) -> None:
    """A line through accuracies and AUCs would be meaningless."""
    records = [make_record(), make_record(task="recommendation", **{"distill.beta": 0.2})]
    for make in (beta_figure, curve_figure):
        with pytest.raises(ValueError, match="several tasks"):
            make(records)


def test_student_without_a_teacher_is_drawn_alone(make_record: MakeRecord) -> None:
    """A fine-tuned student's report must neither fail nor show a teacher."""
    (panel,) = curve_figure([make_record(method="finetune", seed=seed) for seed in (0, 1)]).panels
    assert [line.look for line in panel.lines] == ["mean"]
    both = [make_record(task="retrieval", method=method) for method in ("finetune", "newsbert")]
    (panel,) = curve_figure(both).panels
    assert [line.label for line in panel.lines] == ["method = finetune", "method = newsbert"]
    assert curve_figure([make_record(**run) for run in UNLABELLED]).panels


def test_methods_over_depth_by_hand(make_record: MakeRecord) -> None:
    """One line for each method, with its displayed name; teachers in panels of their own."""
    records = [
        make_record(
            accuracy=0.5 + 0.1 * depth + (0.05 if method == "newsbert" else 0.0) + 0.02 * seed,
            seed=seed,
            method=method,
            **{"student.layers": depth},
        )
        for method in ("finetune", "newsbert")
        for depth in (2, 1)
        for seed in (0, 1)
    ]
    figure = method_figure(records)
    accuracy, _, teachers, _ = figure.panels
    alone, joint = accuracy.lines
    assert (alone.label, joint.label) == ("fine-tuned", "NewsBERT")
    assert alone.x == (1.0, 2.0)
    assert alone.y == pytest.approx((61.0, 71.0))
    assert joint.y == pytest.approx((66.0, 76.0))
    assert [line.label for line in teachers.lines] == ["NewsBERT"]
    assert teachers.y_label == "teacher's test accuracy (%)"


def test_prerequisite_methods_by_hand(make_record: MakeRecord) -> None:
    """Fig. 3: retrieval over depth, one line for each method of the earlier task."""
    records = [
        make_record(
            task="retrieval",
            method="finetune",
            auc=0.6 + 0.01 * depth + (0.02 if before == "newsbert" else 0.0),
            **{"student.layers": depth, "before.method": before},
        )
        for before in ("none", "newsbert")
        for depth in (2, 1)
    ]
    (panel,) = method_figure(records, setting=PREREQUISITE).panels
    assert [line.label for line in panel.lines] == ["the encoder as it is", "after NewsBERT"]
    assert panel.lines[1].y == pytest.approx((63.0, 64.0))
    assert panel.y_label == "test AUC (%)"
    more = make_record(task="retrieval", method="finetune", batch_size=8)
    with pytest.raises(NothingToDraw, match=r"before\.method over depth is left out"):
        method_figure([*records, more], setting=PREREQUISITE)


def test_gradients_of_blocks_by_hand(make_record: MakeRecord) -> None:
    """A block's line is the mean over runs of its depth; runs without a joint teacher are left out."""
    records = []
    for seed in (0, 1):
        record = make_record(seed=seed, epochs=2, **{"student.layers": 2})
        curve = [
            {**entry, "blocks": {"block_1_ratio": 0.5 + seed, "block_1_cosine": 0.2, "block_2_ratio": 1.0}}
            for entry in record.curve
        ]
        records.append(record.model_copy(update={"curve": curve}))
    figure = blocks_figure([*records, make_record(method="finetune", **{"student.layers": 1})])
    ratio, cosine = figure.panels
    assert (ratio.title, cosine.title) == ("N = 2", "N = 2")
    assert [line.label for line in ratio.lines] == ["block 1", "block 2"]
    assert ratio.lines[0].x == (1.0, 2.0)
    assert ratio.lines[0].y == pytest.approx((1.0, 1.0))
    assert ratio.lines[0].sd == pytest.approx((0.5**0.5, 0.5**0.5))
    assert cosine.lines[0].y == pytest.approx((0.2, 0.2))
    assert "block 1 ends at 1.00" in figure.alt


def timed(record: RunRecord, times: float) -> RunRecord:
    """With the speed that a run measures at its end."""
    return record.model_copy(update={"metrics": {**record.metrics, "speed": {"times_teacher": times}}})


def runs(make_record: MakeRecord, method: str = "newsbert") -> list[RunRecord]:
    """Students of 1 and 3 layers with two seeds, beside teachers of 80 %."""
    return [
        timed(
            make_record(
                accuracy=(0.76 if depth == 3 else 0.72) + 0.04 * seed,
                teacher_accuracy=0.8,
                seed=seed,
                method=method,
                **{"student.layers": depth},
            ),
            (2.0 if depth == 3 else 5.0) + 0.2 * seed,
        )
        for depth in (1, 3)
        for seed in (0, 1)
    ]


def test_quality_by_hand(make_record: MakeRecord) -> None:
    """Each seed's student in per cent of its own teacher; the slower first."""
    figure = quality_figure(runs(make_record) + runs(make_record, "disjoint"))
    (panel,) = figure.panels
    assert [line.label for line in panel.lines] == ["NewsBERT", "NewsBERT, disjoint"]
    line = panel.lines[0]
    assert line.x == pytest.approx((2.1, 5.1))
    assert line.y == pytest.approx((97.5, 92.5))
    assert line.sd == pytest.approx((5 / 2**0.5, 5 / 2**0.5))
    assert line.n == (2, 2)
    assert line.notes == ("3 layers", "1 layer")
    assert not panel.lines[1].notes
    assert figure.caption.endswith("from left to right: students of 3, 1 layers.")
    assert "NewsBERT keeps 97.5 % at 2.1 times the speed, 92.5 % at 5.1" in figure.alt


def test_quality_says_why_it_is_left_out(make_record: MakeRecord) -> None:
    """One depth, no teacher, no measured speed; or runs that differ in other settings."""
    both = runs(make_record)
    alone = [make_record(method="finetune", **{"student.layers": depth}) for depth in (1, 2)]
    for records in (
        both[:2],
        alone,
        [r.model_copy(update={"metrics": {"test": r.metrics["test"]}}) for r in both],
    ):
        with pytest.raises(NothingToDraw, match="two depths"):
            quality_figure(records)
    mixed = [*both, timed(make_record(**{"student.layers": 1, "distill.temperature": 2.0}), 5.0)]
    with pytest.raises(NothingToDraw, match=r"distill\.temperature vary too"):
        quality_figure(mixed)
    assert quality_figure(mixed, chosen=True).caption.endswith("the search's best on validation.")


def test_best_at_each_depth_of_a_sweep(make_sweep: MakeSweep) -> None:
    """Chosen by the goal, which is on validation, with all seeds and no other point's."""
    sweep = read_sweep(make_sweep(axes=["learning_rate", "student.layers"], points=9, seeds=(0, 1)))
    best = best_at_each_depth(sweep)
    for depth in {record.settings["student"]["layers"] for record in best}:
        mine = [record for record in best if record.settings["student"]["layers"] == depth]
        points = [p for p in sweep.finished if p.records[0].settings["student"]["layers"] == depth]
        assert mine == max(points, key=lambda point: point.mean()).records
        assert {record.seed for record in mine} == {0, 1}
    assert len(best) == 2 * len({record.settings["student"]["layers"] for record in best}) > 2


def test_figures_compare_only_where_there_is_something(make_record: MakeRecord) -> None:
    """One run has no figure over depth; several depths have one."""
    both = runs(make_record)
    assert "quality_kept" in runs_figures(both)
    assert list(runs_figures(both[:1])) == ["learning_curves"]


def test_losses_by_hand(make_record: MakeRecord) -> None:
    """Losses of the labels and of distillation in panels of their own, averaged over parts of the run."""
    entries = [
        {
            "kind": "log",
            "step": step,
            "steps": 80,
            "epochs": 2,
            "train": {"student_task": float(step), "hidden": 1.0},
        }
        for step in (39, 40, 80)
    ]
    labels, distillation = loss_figure(make_record(), entries).panels
    (line,) = labels.lines
    assert (line.label, line.x, line.y) == ("student task", (1.0, 2.0), (39.5, 80.0))
    assert [line.label for line in distillation.lines] == ["hidden"]
    with pytest.raises(NothingToDraw, match="logged them less than twice"):
        loss_figure(make_record(), entries[:2])
