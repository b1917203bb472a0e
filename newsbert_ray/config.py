"""Every setting of every verb: frozen, documented, validated where it is built. Knows no tensor and no Ray.

"NewsBERT" is Wu et al. 2021; section numbers are its own. Its own values stand beside each field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from newsbert_ray.methods import (
    METHODS,
    OF_BOTH,
    STUDENT_LOSSES,
    TASK_VALUES,
    TEACHER_LOSSES,
    LossWeights,
    MethodName,
    TaskName,
)
from newsbert_ray.settings import Settings, SettingsError, build_settings, dotted_names, merge, nearest

__all__ = [
    "SCRATCH",
    "VECTOR_FILES",
    "BeforeSettings",
    "CheckpointSettings",
    "DistillSettings",
    "LossWeights",
    "ModelSettings",
    "OptimizerSettings",
    "PrepareSettings",
    "RecommendationSettings",
    "ScratchSettings",
    "Settings",
    "SettingsError",
    "StudentSettings",
    "TrainSettings",
    "UserKind",
    "build_settings",
    "dotted_names",
    "merge",
    "nearest",
]

SCRATCH = "scratch"
"""The teacher's name that asks for a small BERT built from settings instead of pretrained weights."""


VECTOR_FILES = (".txt", ".vec", ".txt.gz", ".vec.gz", ".bin", ".bin.gz", ".zip")
"""Endings of files of word vectors, which `prepare` takes where an encoder stands."""

UserKind = Literal["pooling", "self_attention"]
"""How a user's clicks become one embedding."""


class ScratchSettings(Settings):
    """Size of the small BERT built from nothing where `teacher` is `scratch`; unused otherwise."""

    layers: int = Field(4, ge=1, le=48)
    """Transformer layers."""
    hidden: int = Field(64, ge=4)
    """Hidden size D; as wide as the shards' word vectors, where they have any."""
    heads: int = Field(4, ge=1)
    """Attention heads; must divide the hidden size."""
    feed_forward: int = Field(256, ge=4)
    """Size of the feed-forward layer."""
    vocabulary: int = Field(4000, ge=50)
    """WordPieces learned from the training titles by `prepare`."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden % self.heads:
            raise ValueError(f"scratch.heads {self.heads} does not divide scratch.hidden {self.hidden}")
        return self


class ModelSettings(Settings):
    """The pair of encoders and the shared top (NewsBERT 3.1)."""

    teacher_layers: int | None = Field(None, ge=1)
    """First layers of the pretrained encoder that make the teacher (NK; paper: 8 of 12); all by default."""
    dropout: float = Field(0.2, ge=0.0, lt=1.0)
    """Dropout in both encoders (paper: 0.2)."""
    query_size: int = Field(256, ge=1)
    """Size of the attentive pooling's query (paper: 256)."""


class StudentSettings(Settings):
    """The student."""

    layers: int = Field(2, ge=1)
    """Transformer layers N, started from the teacher's (paper: 1, 2, 4); must divide the teacher's."""
    start: Literal["first", "spread"] = "first"
    """Which of the teacher's layers it starts from: first, the first N (paper); spread, each block's last."""
    encoder: str | None = None
    """A pretrained encoder of its own to start from (a released TinyBERT, say), name, folder or URL, of the
    same tokeniser; its first N layers. By default it starts from the teacher's."""
    kind: Literal["transformer", "bilstm", "nrms"] = "transformer"
    """Over the teacher's word embeddings instead: bilstm, one bidirectional LSTM (Tang et al. 2019); nrms,
    self-attention of 20 heads of 20 (NRMS, Wu et al. 2019)."""

    @model_validator(mode="after")
    def _others_are_one_layer(self) -> Self:
        if self.kind != "transformer" and (self.layers != 1 or self.encoder is not None):
            article = "an" if self.kind == "nrms" else "a"
            raise ValueError(f"{article} {self.kind} student has student.layers 1 and no student.encoder")
        return self


class DistillSettings(Settings):
    """Joint learning and momentum distillation (NewsBERT 3.1, 3.2)."""

    beta: float = Field(0.1, ge=0.0, le=1.0)
    """Share of the teacher's gradients in the student's (Eq. 8; paper: 0.1 for topics, 0.15 for
    recommendation, which then is the default; searched over 0 to 0.3)."""
    temperature: float = Field(1.0, gt=0.0)
    """Temperature t of the soft labels (Eq. 3; paper: 1)."""
    soft_label_t2: bool = False
    """Multiply the soft-label loss by t squared (Hinton's factor; the paper has none)."""
    soft_label_form: Literal["cross_entropy", "kl"] = "cross_entropy"
    """How the soft-label loss is written: kl is it less the teacher's entropy, with the same gradient."""
    teacher: Literal["joint", "frozen"] = "joint"
    """joint: the teacher learns together with the student (3.1); frozen: it is fine-tuned first and then only
    read, with a pooling and head of its own."""
    teacher_run: str | None = None
    """Of a frozen teacher: a finished run of method finetune, folder or URL, whose student is the teacher; by
    default one is fine-tuned first, into OUT/teacher, or once for all trials of a sweep that need it."""
    teacher_epochs: int | None = Field(None, ge=1)
    """Epochs of that fine-tuning; as many as the student's by default."""
    teacher_dropout: bool = True
    """Whether a teacher that learns has dropout (`model.dropout`) in its pass, and with it the soft labels
    and states that the student is given; the paper does not say, a frozen teacher never has."""
    shared_top: bool = True
    """Whether both stand under one pooling and head (3.1); a frozen teacher never does."""
    map_hidden: bool = False
    """Compare a learned linear map of the student's states with the teacher's, which may be wider."""
    first_share: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of all updates that make a first stage, with losses of its own (TinyBERT, MiniLM)."""
    first: LossWeights = LossWeights()
    """A factor for each loss in the first stage; of no effect where there is none."""
    weights: LossWeights = LossWeights()
    """A factor for each loss."""

    @property
    def stages(self) -> tuple[LossWeights, ...]:
        """The weights of each stage there is."""
        return (self.first, self.weights) if self.first_share else (self.weights,)

    @property
    def losses(self) -> frozenset[str]:
        """Names of the losses that are used in any stage."""
        return frozenset(name for stage in self.stages for name, w in stage.model_dump().items() if w)

    def weights_at(self, step: int, total_steps: int) -> LossWeights:
        """The weights of update `step` (from 1) of `total_steps`."""
        return self.first if step <= round(self.first_share * total_steps) else self.weights

    @property
    def alone(self) -> bool:
        """Whether the student learns from its labels alone, so that no teacher is needed."""
        return self.beta == 0 and self.losses <= {"student_task"}

    @property
    def frozen(self) -> bool:
        """Whether a teacher is needed that was fine-tuned before."""
        return self.teacher == "frozen" and not self.alone

    @property
    def own_tops(self) -> bool:
        """Whether the teacher has a pooling and head of its own."""
        return self.frozen or not self.shared_top

    @model_validator(mode="after")
    def _losses_reach_both(self) -> Self:
        for stage in self.stages:
            if not any(getattr(stage, name) for name in STUDENT_LOSSES):
                raise ValueError(
                    "no loss reaches the student's layers; set one of "
                    f"{', '.join(f'weights.{name}' for name in STUDENT_LOSSES[:4])} above 0"
                )
        if self.frozen and not self.losses.isdisjoint(TEACHER_LOSSES):
            raise ValueError(
                "a frozen teacher learns nothing; set weights.teacher_task and "
                "weights.teacher_soft_labels to 0"
            )
        if self.beta > 0 and (self.frozen or self.weights.teacher_task == 0):
            reason = "a frozen one has none" if self.frozen else "weights.teacher_task 0 leaves none"
            raise ValueError(
                f"beta {self.beta} mixes in the teacher's gradients, and {reason}; set beta to 0"
            )
        return self


class RecommendationSettings(Settings):
    """Click prediction from a user's history (NewsBERT 3.3, Fig. 2); unused in other tasks."""

    npratio: int = Field(4, ge=1)
    """Non-clicked candidates drawn for each click, anew each epoch, from the click's own impression."""
    history: int = Field(50, ge=1)
    """A user's last clicks that are read (user_log_length in other code)."""
    user: UserKind = "pooling"
    """How clicks become a user: pooling, attentive pooling (paper); self_attention, 20 heads of 20 under it
    (NRMS; an encoder 400 wide, as student.kind nrms is)."""


class BeforeSettings(Settings):
    """A run that comes first and whose student this one starts from (NewsBERT Fig. 3); none by default."""

    method: MethodName | Literal["none"] = "none"
    """How that student learned (any method whose student is a Transformer over the teacher's tokens); none:
    this run starts from the encoder as it is."""
    task: TaskName = "recommendation"
    """What it learned."""
    data: str | None = None
    """Its shards, prepared with the same encoder, folder or URL; this run's own by default."""
    epochs: int | None = Field(None, ge=1)
    """Its epochs; as many as this run's by default."""
    learning_rate: float | None = Field(None, gt=0.0)
    """Its learning rate; this run's by default."""
    train_rows: int | None = Field(None, ge=1)
    """Train it on so many examples only; as many as this run by default."""

    @model_validator(mode="after")
    def _student_goes_on(self) -> Self:
        if self.method in ("bilstm_soft", "glove"):
            raise ValueError(f"before.method {self.method}: its student is no encoder to start from")
        return self


class OptimizerSettings(Settings):
    """Adam and its schedule (NewsBERT 4.1: Adam, one rate)."""

    teacher_learning_rate: float | None = Field(None, gt=0.0)
    """The teacher's own learning rate; `learning_rate` by default, as in the paper."""
    student_learning_rate: float | None = Field(None, gt=0.0)
    """The student's own learning rate; `learning_rate` by default."""
    top_learning_rate: float | None = Field(None, gt=0.0)
    """The shared top's own learning rate; `learning_rate` by default."""
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """Adam's decay of the first moment."""
    beta2: float = Field(0.999, ge=0.0, lt=1.0)
    """Adam's decay of the second moment."""
    epsilon: float = Field(1e-8, gt=0.0)
    """Adam's epsilon."""
    warmup_share: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of all steps over which the learning rate rises linearly from 0."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """How the learning rate falls to 0 after the warm-up."""
    clip_norm: float | None = Field(None, gt=0.0)
    """Largest norm of the whole gradient, after mixing; no clipping by default."""
    accumulate: int = Field(1, ge=1)
    """Parts that a worker's share of a batch is computed in: less memory, the same update."""


class CheckpointSettings(Settings):
    """What a resume goes on from."""

    every_steps: int | None = Field(None, ge=1)
    """Also write a checkpoint every so many steps; at each epoch's end it is written anyway."""
    every_minutes: float | None = Field(10.0, gt=0.0)
    """Also write one when so many minutes have passed since the last; null for never."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints kept, besides the best model."""
    keep_finished: bool = True
    """Keep checkpoints (and with them the teacher) once the run is finished; a sweep's trials do not."""


class TrainSettings(Settings):
    """One joint distillation run: a prepared corpus and a teacher in, a student and its record out."""

    data: str
    """Folder of shards that `newsbert-ray prepare` wrote, or its URL (s3://, gs://)."""
    teacher: str
    """Hugging Face name or folder of an encoder (safetensors), or `scratch` for a small BERT from nothing."""
    out: str
    """Folder of the run, or its URL: record.json, student/, checkpoints/, TensorBoard events."""
    task: TaskName = "topics"
    """What the pair learns: topics of titles, recommendation from behaviours, or retrieval of query-text
    pairs."""
    method: MethodName = "newsbert"
    """How the student learns: newsbert (jointly with the teacher), finetune (alone, from its labels), or as
    another paper has it; a method is a change to the other settings, which may be given besides."""
    student: StudentSettings = StudentSettings()
    """The student."""
    distill: DistillSettings = DistillSettings()
    """Joint learning and momentum."""
    model: ModelSettings = ModelSettings()
    """Encoders and shared top."""
    recommendation: RecommendationSettings = RecommendationSettings()
    """Histories and negatives."""
    scratch: ScratchSettings = ScratchSettings()
    """Size of a teacher from scratch."""
    before: BeforeSettings = BeforeSettings()
    """A student to start from, learned first."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """Adam and its schedule."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    """What a resume goes on from."""
    epochs: int = Field(2, ge=1)
    """Passes over the training examples."""
    batch_size: int = Field(32, ge=1)
    """Examples of one update, over all workers: titles, clicks or pairs (paper: 32)."""
    token_budget: int = Field(8192, ge=512)
    """Most tokens, padding included, that an encoder reads at once in training; a batch's texts are encoded
    in buckets of like length within it, fewer the larger it is: give a GPU more."""
    learning_rate: float = Field(5e-5, gt=0.0)
    """Adam's learning rate (paper: 3e-6, with far longer training)."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of initialisation, order and dropout."""
    workers: int = Field(1, ge=1)
    """Ray Train workers; one needs no cluster. A batch is cut for so many, and for that many alone."""
    min_workers: int | None = Field(None, ge=1)
    """Go on with as few workers while nodes are missing, the others' shares shared out (the result is the
    same), and with more as they come; all `workers` are waited for by default."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the encoders; parameters, optimiser and losses stay in fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of a worker; all cores for a run of its own, one for a sweep's trial."""
    train_rows: int | None = Field(None, ge=1)
    """Train on so many examples only, drawn by a fixed hash; all by default."""
    evaluate_every: int | None = Field(None, ge=1)
    """Also evaluate on validation every so many steps; at each epoch's end it is done anyway."""
    log_every: int = Field(20, ge=1)
    """Steps between two entries of the log and of TensorBoard."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Lay what is given over the task's and the method's own values."""
        if not isinstance(values, Mapping):
            return values
        task, method = str(values.get("task")), str(values.get("method"))
        return merge(
            TASK_VALUES.get(task, {}), METHODS.get(method, {}), OF_BOTH.get((method, task), {}), values
        )

    @model_validator(mode="after")
    def _values_fit(self) -> Self:
        if self.teacher.lower().endswith(VECTOR_FILES):
            raise ValueError(
                f"teacher {self.teacher}: word vectors come with the shards that they were prepared with; "
                f"give --teacher {SCRATCH}, or --method glove"
            )
        if self.before.method != "none" and not (
            self.distill.alone and self.student.kind == "transformer" and self.student.encoder is None
        ):
            raise ValueError(
                f"before.method {self.before.method} makes a student that goes on learning alone; set "
                "--method finetune"
            )
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is more than workers {self.workers}")
        parts = self.workers * self.optimizer.accumulate
        if self.batch_size < parts:
            raise ValueError(
                f"batch_size {self.batch_size} is less than workers x optimizer.accumulate = {parts}; "
                "each part of a batch needs an example"
            )
        return self


class PrepareSettings(Settings):
    """MIND's files, or tables of query-text pairs, to tokenised Parquet shards."""

    source: list[str] = Field(min_length=1)
    """Folder or zip with news.tsv and behaviors.tsv, or a table (.tsv, .csv, .jsonl, .parquet) of query, text
    and clicked, or its URL (s3://, gs://); give it once each for train, dev and test."""
    teacher: str
    """Encoder whose tokeniser is used: a Hugging Face name, a folder, or `scratch`; or a file of word vectors
    in GloVe's text form (glove.6B.300d.txt), whose words then are the tokens."""
    out: str
    """Folder for the shards and their manifest.json, or its URL."""
    max_tokens: int | None = Field(None, ge=3)
    """Longest title, or text of a table, in tokens with [CLS] and [SEP]; longer ones are cut. 30 for titles,
    512 for a table's texts by default."""
    query_tokens: int = Field(30, ge=3)
    """Longest query of a table in tokens."""
    validation_share: float = Field(0.1, gt=0.0, lt=0.5)
    """Share held out for validation: of the training news by a seeded hash of the news id, of the training
    impressions the last by time, of a table's pairs by a seeded hash of the query."""
    test_share: float = Field(0.1, gt=0.0, lt=0.5)
    """Share for test, likewise, where only one source is given; otherwise the later source is test."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the hash that splits."""
    max_rejected_share: float = Field(0.01, ge=0.0, le=1.0)
    """More bad lines than this share of a file is an error."""
    scratch: ScratchSettings = ScratchSettings()
    """With `scratch`: how many WordPieces to learn."""
    workers: int | None = Field(None, ge=0)
    """Ray Data tasks at once; all cores by default, 0 works in this process without Ray."""
    overwrite: bool = False
    """Replace shards that were made from other sources or settings."""
