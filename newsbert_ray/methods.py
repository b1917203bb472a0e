"""Losses, methods, tasks and metrics, each in one list.

A method is a change to the training settings. All methods use the same training loop, batches and encoder.
Equations and sections refer to NewsBERT (Wu et al. 2021) unless another paper is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from pydantic import Field

from newsbert_ray.settings import Settings


def _weight(
    default: float,
    *,
    trains: Literal["student", "teacher", "part"] = "student",
    reads: Literal["predictions", "hidden_states", "attention"] = "predictions",
    widths: Literal["any", "equal", "mapped"] = "any",
) -> Any:
    """A loss's weight in method `newsbert`, and its properties: the model whose layers it alone trains (part:
    only some layers, or only in some tasks), the innermost outputs of the encoders that it compares, and
    whether both must be equally wide (mapped: unless `distill.map_hidden` is on)."""
    return Field(default, ge=0.0, json_schema_extra={"trains": trains, "reads": reads, "widths": widths})


class LossWeights(Settings):
    """Weight of each loss. The paper uses 1 for all of its own; 0 turns a loss off.

    This is the only list of losses. A new loss is one line here and its formula in `distill.joint`.
    """

    teacher_task: float = _weight(1.0, trains="teacher")
    """Weight of the teacher's task loss L_t (Eq. 6)."""
    student_task: float = _weight(1.0)
    """Weight of the student's task loss (second term of Eq. 5)."""
    embedding: float = _weight(1.0, trains="part", reads="hidden_states", widths="mapped")
    """Weight of the MSE between the embedding layers' outputs (first term of Eq. 1)."""
    hidden: float = _weight(1.0, reads="hidden_states", widths="mapped")
    """Weight of the MSE between the hidden states of each block (second term of Eq. 1)."""
    news_embedding: float = _weight(1.0, widths="equal")
    """Weight of the MSE between the news embeddings (Eq. 2)."""
    user_embedding: float = _weight(1.0, trains="part", widths="equal")
    """Weight of the MSE between the user embeddings (3.3); recommendation only."""
    soft_labels: float = _weight(1.0)
    """Weight of the cross-entropy with the teacher's soft labels (Eq. 3)."""
    teacher_soft_labels: float = _weight(0.0, trains="teacher")
    """Weight of the teacher's loss on the student's soft labels (deep mutual learning, Zhang et al. 2018)."""
    logits: float = _weight(0.0)
    """Weight of the MSE between the logits (BiLSTM-soft, Tang et al. 2019)."""
    cls: float = _weight(0.0, reads="hidden_states", widths="equal")
    """Weight of the MSE between normalised [CLS] states of all matched layers but the last (BERT-PKD, Sun et
    al. 2019)."""
    cosine: float = _weight(0.0, reads="hidden_states", widths="equal")
    """Weight of 1 - cosine between the last layers' hidden states (DistilBERT, Sanh et al. 2019)."""
    attention_scores: float = _weight(0.0, reads="attention")
    """Weight of the MSE between attention scores before the softmax (TinyBERT, Jiao et al. 2020)."""
    attention_maps: float = _weight(0.0, reads="attention")
    """Weight of the KL divergence between the last layers' attention (MiniLM, Wang et al. 2020)."""
    value_relations: float = _weight(0.0, reads="attention")
    """Weight of the KL divergence between the last layers' value relations (MiniLM)."""


def losses_where(**properties: str) -> tuple[str, ...]:
    """Names of the losses with these properties of `_weight`, in their order above."""
    fields = LossWeights.model_fields.items()
    wanted = properties.items()
    return tuple(name for name, field in fields if wanted <= cast(Any, field.json_schema_extra).items())


LOSSES = tuple(LossWeights.model_fields)
"""Every loss."""
STUDENT_LOSSES = losses_where(trains="student")
TEACHER_LOSSES = losses_where(trains="teacher")
ATTENTION_LOSSES = losses_where(reads="attention")
STATE_LOSSES = losses_where(reads="hidden_states") + ATTENTION_LOSSES
"""Losses that compare layers of the encoders; the others need embeddings and predictions only."""

LABEL_LOSSES: Mapping[str, frozenset[str]] = {
    "topics": frozenset({"student_task", "user_embedding"}),
    "recommendation": frozenset({"student_task", "user_embedding", "soft_labels", "logits"}),
}
"""Losses of the student that a text without label, or a news without click, does not have, by task."""


def _only(**weights: float) -> dict[str, float]:
    """Weights that turn off every other loss."""
    return {**dict.fromkeys(LOSSES, 0.0), **weights}


def _frozen(weights: Mapping[str, float], **distill: Any) -> dict[str, Any]:
    """A frozen teacher, these loss weights, and further settings of `distill`."""
    return {"distill": {"teacher": "frozen", "beta": 0.0, **distill, "weights": weights}}


_HIDDEN = {"embedding": 0.0, "hidden": 0.0, "news_embedding": 0.0, "user_embedding": 0.0}

METHODS: Mapping[str, Mapping[str, Any]] = {
    "newsbert": {},
    # The first N layers learn from labels only; there is no teacher (4.2: UniLM-1, 2, 4; BERT-12, 8).
    "finetune": {"distill": {"beta": 0.0, "weights": _only(student_task=1.0)}},
    # Ablations of Fig. 6, and of each part of the hidden loss (Eqs. 1 and 2, 3.3).
    "no_momentum": {"distill": {"beta": 0.0}},
    "no_soft_labels": {"distill": {"weights": {"soft_labels": 0.0}}},
    "no_hidden": {"distill": {"weights": _HIDDEN}},
    "no_embedding": {"distill": {"weights": {"embedding": 0.0}}},
    "no_layers": {"distill": {"weights": {"hidden": 0.0}}},
    "no_news_embedding": {"distill": {"weights": {"news_embedding": 0.0, "user_embedding": 0.0}}},
    # Fig. 4: the same losses with a teacher that was fine-tuned first; each model has its own top.
    "disjoint": _frozen({"teacher_task": 0.0}),
    # Deep mutual learning (Zhang et al. 2018, Eqs. 4-6): both models learn from the other's soft labels.
    "mutual": {
        "distill": {
            "beta": 0.0,
            "shared_top": False,
            "soft_label_form": "kl",
            "weights": _only(teacher_task=1.0, student_task=1.0, soft_labels=1.0, teacher_soft_labels=1.0),
        }
    },
    # Lu et al. 2020: labels and soft labels.
    "twinbert": _frozen(_only(student_task=1.0, soft_labels=1.0)),
    # Jiao et al. 2020, Eqs. 7-10: first attention, embeddings and layers, then soft labels (temperature 1).
    "tinybert": _frozen(
        _only(soft_labels=1.0),
        map_hidden=True,
        first_share=0.5,
        first=_only(attention_scores=1.0, embedding=1.0, hidden=1.0),
    ),
    # Sun et al. 2019, Eqs. 4-8: alpha 0.7, t 10, beta 500, "skip".
    "pkd": _frozen(
        _only(student_task=0.3, soft_labels=0.7, cls=500.0),
        temperature=10.0,
        soft_label_t2=True,
        soft_label_form="kl",
    ),
    # Sanh et al. 2019, without masked language modelling, which is part of pre-training.
    "distilbert": {
        "student": {"start": "spread"},
        **_frozen(
            _only(student_task=1.0, soft_labels=5.0, cosine=1.0),
            temperature=2.0,
            soft_label_t2=True,
            soft_label_form="kl",
        ),
    },
    # Wang et al. 2020, Eqs. 4-8: first the last layer's attention and value relations, then soft labels.
    "minilm": _frozen(
        _only(soft_labels=1.0), first_share=0.5, first=_only(attention_maps=1.0, value_relations=1.0)
    ),
    # Tang et al. 2019: a one-layer BiLSTM learns from labels and the teacher's logits.
    "bilstm_soft": {
        "student": {"kind": "bilstm", "layers": 1},
        **_frozen(_only(student_task=1.0, logits=1.0)),
    },
    # 4.2: no pretrained encoder; a Transformer with random weights over the shards' word vectors.
    "glove": {
        "teacher": "scratch",
        "scratch": {"hidden": 300, "heads": 10, "feed_forward": 1200},
        "student": {"layers": 1},
        "distill": {"beta": 0.0, "weights": _only(student_task=1.0)},
    },
    # The public code that runs NewsBERT as a baseline (Tiny-NewsRec, 2022), by one of its authors: a teacher
    # that was trained before, the last two layers learn, one teacher layer for each of the student's.
    "newsbert_warm": {
        "model": {"trainable": 2},
        "distill": {"teacher": "warm", "blocks": "last", "weights": {"student_task": 0.1, "embedding": 0.0}},
    },
    # Labels, and a fine-tuned teacher's soft labels on all texts; its values were chosen on validation.
    "best": {
        "student": {"start_from": "teacher"},
        "unlabelled_share": 0.75,
        "learning_rate": 8e-4,
        **_frozen(
            _only(student_task=0.25, soft_labels=1.0),
            temperature=2.0,
            soft_label_t2=True,
            soft_label_form="kl",
        ),
    },
    # The baseline of every classifier of texts: TF-IDF and a linear SVM; no encoder is read.
    "linear": {
        "teacher": "scratch",
        "student": {"kind": "linear", "layers": 0},
        "distill": {"beta": 0.0, "weights": _only(student_task=1.0)},
    },
}
"""Settings that each method changes; explicit settings override them."""

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]

TASK_VALUES: Mapping[str, Mapping[str, Any]] = {"recommendation": {"distill": {"beta": 0.15}}}
"""Settings that a task changes: the paper's values for it (4.1)."""

METHOD_TASK_VALUES: Mapping[tuple[str, str], Mapping[str, Any]] = {
    # News without clicks have no soft labels; retrieval has no texts without a pair.
    ("best", "recommendation"): {"distill": {"weights": {"news_embedding": 1.0}}},
    ("best", "retrieval"): {"unlabelled_share": 0.0},
    # NRMS (Wu et al. 2019): 20 heads of size 20 over words and over clicks, additive attention of size 200.
    ("glove", "recommendation"): {
        "student": {"kind": "nrms"},
        "model": {"query_size": 200},
        "recommendation": {"user": "self_attention"},
    },
}
"""Settings that a method changes for one task, by (method, task)."""

TaskName = Literal["topics", "recommendation", "retrieval"]


class Metric(NamedTuple):
    """A number from 0 to 1: its name in records (`auc`) and its heading in tables (`AUC`)."""

    name: str
    heading: str


class Task(NamedTuple):
    """Names and metrics of a task.

    `examples` is what training counts, `rows` what evaluation counts. The first metric selects the best model
    of a run, and is the default goal of a sweep.
    """

    examples: str
    rows: str
    metrics: tuple[Metric, ...]

    @property
    def primary(self) -> Metric:
        """The metric that selects the best model."""
        return self.metrics[0]


TASKS: Mapping[TaskName, Task] = {
    "topics": Task("titles", "titles", (Metric("accuracy", "accuracy"), Metric("macro_f1", "macro-F1"))),
    "recommendation": Task(
        "clicks",
        "impressions",
        (Metric("auc", "AUC"), Metric("mrr", "MRR"), Metric("ndcg5", "nDCG@5"), Metric("ndcg10", "nDCG@10")),
    ),
    "retrieval": Task("pairs", "pairs", (Metric("auc", "AUC"),)),
}

HEADINGS = {metric.name: metric.heading for task in TASKS.values() for metric in task.metrics}
"""Heading of every metric, by its name."""


def task_of(settings: Mapping[str, Any]) -> Task:
    """The task in a run's settings, as they are in its record."""
    name: TaskName = settings.get("task", "topics")
    return TASKS[name]
