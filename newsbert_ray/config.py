"""Settings of `train`, `sweep` and `prepare`: frozen, documented and validated.

Descriptions are the help of the flags. "Paper", equations and sections refer to NewsBERT (Wu et al. 2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from newsbert_ray import methods
from newsbert_ray.methods import LossWeights, MethodName, TaskName
from newsbert_ray.settings import Settings, SettingsError, build_settings, dotted_names, merge, nearest

# Imported from here by others, with the classes below.
__all__ = ["LossWeights", "Settings", "SettingsError", "build_settings", "dotted_names", "merge", "nearest"]

SCRATCH = "scratch"
"""Value of `teacher` for a small BERT with random weights instead of a pretrained encoder."""

ENCODERS = (
    "bert", "big_bird", "camembert", "data2vec-text", "deberta", "deberta-v2", "distilbert", "electra",
    "ernie", "eurobert", "gte", "jina_embeddings_v3", "megatron-bert", "mobilebert", "modernbert",
    "mpnet", "nomic_bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer",
    "splinter", "unilmv2", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
"""Model types of the encoders that can be a teacher: layers of their own, and no output reads padding."""

VECTOR_FILES = (".txt", ".vec", ".txt.gz", ".vec.gz", ".bin", ".bin.gz", ".zip")
"""File name endings of word vectors, which `prepare` accepts as `teacher`."""

UserKind = Literal["pooling", "self_attention"]
"""How a user's history becomes one embedding."""


class ScratchSettings(Settings):
    """Size of the small BERT with random weights; used only if `teacher` is `scratch`."""

    layers: int = Field(4, ge=1, le=48)
    """Transformer layers."""
    hidden: int = Field(64, ge=4)
    """Hidden size D. With word vectors it must be their size."""
    heads: int = Field(4, ge=1)
    """Attention heads. Must divide the hidden size."""
    feed_forward: int = Field(256, ge=4)
    """Size of the feed-forward layers."""
    vocabulary: int = Field(4000, ge=50)
    """Number of WordPieces that `prepare` learns from the training titles."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden % self.heads:
            raise ValueError(f"scratch.heads {self.heads} does not divide scratch.hidden {self.hidden}")
        return self


class ModelSettings(Settings):
    """The two encoders, and the pooling and head on top of them (3.1)."""

    teacher_layers: int | None = Field(None, ge=1)
    """Number of layers of the pretrained encoder that the teacher uses (paper: the first 8 of 12). By default
    all."""
    dropout: float = Field(0.2, ge=0.0, lt=1.0)
    """Dropout rate in both encoders (paper: 0.2)."""
    query_size: int = Field(256, ge=1)
    """Size of the query vector in attentive pooling (paper: 256)."""
    trainable: int | None = Field(None, ge=1)
    """Number of each encoder's last layers that learn; the layers below and the embeddings stay as they
    start. By default all learn."""


class StudentSettings(Settings):
    """The student."""

    layers: int = Field(2, ge=0)
    """Number of Transformer layers N (paper: 1, 2, 4). Must divide the number of teacher layers. 0: only
    word vectors, made of the teacher's output for each token."""
    width: int | None = Field(None, ge=1)
    """Size of the word vectors with `student.layers 0`, by principal components. By default the teacher's."""
    start: Literal["first", "spread"] = "first"
    """Teacher layers that initialise the student: the first N (paper), or the last layer of each block."""
    start_from: Literal["encoder", "teacher"] | None = None
    """Whose layers these are: the pretrained encoder's, or those of the teacher that was fine-tuned first. By
    default the teacher's if it learns on (`distill.teacher warm`) or the student has no layers, otherwise the
    encoder's."""
    encoder: str | None = None
    """Another pretrained encoder to initialise the student from, such as a released TinyBERT: name, folder or
    URL. It needs the same tokeniser. By default the teacher."""
    kind: Literal["transformer", "bilstm", "nrms", "linear"] = "transformer"
    """Architecture. bilstm: one bidirectional LSTM (Tang et al. 2019). nrms: one self-attention with 20 heads
    of size 20 (NRMS, Wu et al. 2019). Both read the teacher's word embeddings. linear: no encoder, but TF-IDF
    of words and characters and a linear SVM, whose strength is chosen on validation; topics only."""

    @model_validator(mode="after")
    def _others_are_one_layer(self) -> Self:
        layers = 0 if self.kind == "linear" else 1
        if self.kind != "transformer" and (self.layers != layers or self.encoder is not None):
            raise ValueError(f"student.kind {self.kind} needs student.layers {layers} and no student.encoder")
        if self.layers == 0 and self.encoder is not None:
            raise ValueError("student.layers 0 makes word vectors from the teacher: drop student.encoder")
        if self.layers > 0 and self.width is not None:
            raise ValueError("student.width needs student.layers 0; others are as wide as the teacher")
        return self


class DistillSettings(Settings):
    """Joint learning and momentum distillation (3.1, 3.2)."""

    beta: float = Field(0.1, ge=0.0, le=1.0)
    """Share of the teacher's gradients in the student's update (Eq. 8). For recommendation the default is
    0.15 (paper: 0.1 for topics, 0.15 for recommendation, searched from 0 to 0.3)."""
    temperature: float = Field(1.0, gt=0.0)
    """Temperature of the soft labels (Eq. 3; paper: 1)."""
    soft_label_t2: bool = False
    """Multiply the soft-label loss by the squared temperature (Hinton et al. 2015; not in the paper)."""
    soft_label_form: Literal["cross_entropy", "kl"] = "cross_entropy"
    """Form of the soft-label loss. kl subtracts the teacher's entropy; the gradient is the same."""
    momentum: Literal["gradient", "rescaled", "update"] = "gradient"
    """What `beta` mixes: the gradients (paper), the teacher's scaled to the norm of the student layer's, or
    Adam's updates."""
    blocks: Literal["all", "last"] = "all"
    """Teacher layers of each student layer: K consecutive ones (3.2), or one of the teacher's last N."""
    teacher: Literal["joint", "warm", "frozen"] = "joint"
    """joint: the teacher learns together with the student (3.1). warm: the same, but it is fine-tuned first,
    with pooling and head. frozen: it is fine-tuned first, with its own pooling and head, and stays fixed."""
    teacher_run: str | None = None
    """A finished run of method finetune, whose student becomes the teacher; folder or URL. A joint teacher
    starts from it, as a warm one. By default a warm or frozen teacher is fine-tuned into OUT/teacher, or
    once for all trials of a sweep."""
    teacher_epochs: int | None = Field(None, ge=1)
    """Epochs in which a warm or frozen teacher is fine-tuned first. By default those of the student."""
    teacher_dropout: bool = True
    """Use dropout in the teacher while it learns, and so in the targets of the student. The paper does not
    say. A frozen teacher has no dropout."""
    shared_top: bool = True
    """Use one pooling and head for both models (3.1). A frozen teacher has its own."""
    map_hidden: bool = False
    """Compare the teacher with a learned linear map of the student's hidden states. Needed if the teacher is
    wider."""
    first_share: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of all steps that form a first stage with its own loss weights (TinyBERT, MiniLM)."""
    first: LossWeights = LossWeights()
    """Weight of each loss in the first stage; used only with `distill.first_share`."""
    weights: LossWeights = LossWeights()
    """Weight of each loss."""

    @property
    def stages(self) -> tuple[LossWeights, ...]:
        """Loss weights of each stage."""
        return (self.first, self.weights) if self.first_share else (self.weights,)

    @property
    def losses(self) -> frozenset[str]:
        """Names of the losses that some stage uses."""
        return frozenset(name for stage in self.stages for name, w in stage.model_dump().items() if w)

    def weights_at(self, step: int, total_steps: int) -> LossWeights:
        """Loss weights at `step` (from 1) of `total_steps`."""
        return self.first if step <= round(self.first_share * total_steps) else self.weights

    @property
    def alone(self) -> bool:
        """Whether the student learns from labels only, so that no teacher is needed."""
        return self.beta == 0 and self.losses <= {"student_task"}

    @property
    def frozen(self) -> bool:
        """Whether a fine-tuned teacher is needed that stays fixed."""
        return self.teacher == "frozen" and not self.alone

    @property
    def warm(self) -> bool:
        """Whether a fine-tuned teacher is needed that learns on."""
        started = self.teacher == "warm" or (self.teacher == "joint" and self.teacher_run is not None)
        return started and not self.alone

    @property
    def own_tops(self) -> bool:
        """Whether the teacher has its own pooling and head."""
        return self.frozen or not self.shared_top

    @model_validator(mode="after")
    def _losses_reach_both(self) -> Self:
        for stage in self.stages:
            if not any(getattr(stage, name) for name in methods.STUDENT_LOSSES):
                raise ValueError(
                    "no loss trains the student's layers; set one of "
                    f"{', '.join(f'distill.weights.{name}' for name in methods.STUDENT_LOSSES[:4])} above 0"
                )
        if self.frozen and not self.losses.isdisjoint(methods.TEACHER_LOSSES):
            raise ValueError(
                "a frozen teacher does not learn; set "
                + " and ".join(f"distill.weights.{name}" for name in methods.TEACHER_LOSSES)
                + " to 0"
            )
        if self.beta > 0 and (self.frozen or self.weights.teacher_task == 0):
            reason = "the teacher is frozen" if self.frozen else "distill.weights.teacher_task is 0"
            raise ValueError(
                f"distill.beta {self.beta} needs the teacher's gradients, but {reason}; set distill.beta to 0"
            )
        return self


class RecommendationSettings(Settings):
    """Click prediction from a user's history (3.3, Fig. 2); used only for task recommendation."""

    npratio: int = Field(4, ge=1)
    """Number of non-clicked news per click, drawn from the same impression, new in each epoch."""
    history: int = Field(50, ge=1)
    """Number of a user's last clicks to use (user_log_length in other code)."""
    user: UserKind = "pooling"
    """User encoder. pooling: attentive pooling (paper). self_attention: 20 heads of size 20 before the
    pooling (NRMS); needs an encoder of width 400, such as student.kind nrms."""


class BeforeSettings(Settings):
    """A prerequisite run whose student initialises this run's student (Fig. 3); by default none."""

    method: MethodName | Literal["none"] = "none"
    """Method of the prerequisite run. Its student must be a Transformer. none: start from the encoder."""
    task: TaskName = "recommendation"
    """Task of the prerequisite run."""
    data: str | None = None
    """Shards of the prerequisite run, prepared with the same encoder; folder or URL. By default this
    run's."""
    epochs: int | None = Field(None, ge=1)
    """Epochs of the prerequisite run. By default this run's."""
    learning_rate: float | None = Field(None, gt=0.0)
    """Learning rate of the prerequisite run. By default this run's."""
    train_rows: int | None = Field(None, ge=1)
    """Number of training examples of the prerequisite run. By default this run's."""

    @model_validator(mode="after")
    def _student_goes_on(self) -> Self:
        if self.method in ("bilstm_soft", "glove", "linear"):
            raise ValueError(f"before.method {self.method}: its student is not a Transformer; choose another")
        return self


class OptimizerSettings(Settings):
    """Adam and the schedule of its learning rate (4.1: Adam, one constant rate)."""

    teacher_learning_rate: float | None = Field(None, gt=0.0)
    """Learning rate of the teacher. By default `learning_rate`, but at most 1e-4 for a pretrained one."""
    student_learning_rate: float | None = Field(None, gt=0.0)
    """Learning rate of the student. By default `learning_rate`."""
    top_learning_rate: float | None = Field(None, gt=0.0)
    """Learning rate of pooling and head. By default `learning_rate`."""
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """Adam's decay rate of the first moment."""
    beta2: float = Field(0.999, ge=0.0, lt=1.0)
    """Adam's decay rate of the second moment."""
    epsilon: float = Field(1e-8, gt=0.0)
    """Adam's epsilon."""
    warmup_share: float = Field(0.05, ge=0.0, lt=1.0)
    """Share of all steps in which the learning rate rises linearly from 0."""
    decay: Literal["none", "linear", "cosine"] = "linear"
    """How the learning rate falls to 0 after the warm-up; none keeps it constant, as in the paper."""
    clip_norm: float | None = Field(None, gt=0.0)
    """Largest norm of the whole gradient, after the teacher's share is mixed in. By default no clipping."""
    accumulate: int = Field(1, ge=1)
    """Number of parts in which a worker computes its share of a batch. More parts need less memory; the
    update is the same."""


class CheckpointSettings(Settings):
    """When checkpoints are written, and which are kept."""

    every_steps: int | None = Field(None, ge=1)
    """Also write a checkpoint every so many steps."""
    at_evaluation: bool = True
    """Write a checkpoint at every evaluation, and so at the end of an epoch. Turn it off for short runs with
    many evaluations: one that is interrupted starts again."""
    every_minutes: float | None = Field(10.0, gt=0.0)
    """Also write a checkpoint if the last one is so many minutes old; null turns this off."""
    keep: int = Field(2, ge=1)
    """Number of newest checkpoints to keep besides the best model."""
    keep_finished: bool = True
    """Keep the best model, and with it the teacher, when the run has finished. Trials of a sweep do
    not."""


TEACHER_RATE = 1e-4
"""A pretrained teacher's learning rate is at most this, unless it is set."""


class TrainSettings(Settings):
    """One run: shards and a teacher in, a student and its record out."""

    data: str
    """Folder of shards from `newsbert-ray prepare`, or its URL (s3://, gs://)."""
    teacher: str
    """Pretrained encoder: a Hugging Face name, or a folder with safetensors; `scratch` for a small BERT with
    random weights."""
    out: str
    """Folder of the run, or its URL. It gets record.json, student/, checkpoints/ and TensorBoard events."""
    task: TaskName = "topics"
    """What to learn: topics of titles, recommendation from behaviours, or retrieval from query-text pairs."""
    method: MethodName = "newsbert"
    """How the student learns. newsbert: jointly with the teacher; finetune: from labels only; others:
    ablations and methods of other papers. A method changes defaults of other settings."""
    student: StudentSettings = StudentSettings()
    """The student."""
    distill: DistillSettings = DistillSettings()
    """Joint learning and momentum."""
    model: ModelSettings = ModelSettings()
    """Encoders, pooling and head."""
    recommendation: RecommendationSettings = RecommendationSettings()
    """Histories and negative examples."""
    scratch: ScratchSettings = ScratchSettings()
    """Size of a teacher with random weights."""
    before: BeforeSettings = BeforeSettings()
    """A prerequisite run to start from."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """Optimiser."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    """Checkpoints."""
    epochs: int = Field(2, ge=1)
    """Number of passes over the training examples."""
    steps: int | None = Field(None, ge=1)
    """Length of the run in updates, instead of `epochs`; the last epoch is cut."""
    batch_size: int = Field(32, ge=1)
    """Examples in one update, over all workers: titles, clicks or pairs (paper: 32)."""
    token_budget: int = Field(8192, ge=512)
    """Most tokens, with padding, that an encoder processes at once in training. Texts of similar length share
    a part. Larger values suit a GPU."""
    learning_rate: float = Field(6e-4, gt=0.0)
    """Learning rate of Adam. The default suits students of 1 to 3 layers; a deeper one wants less (1e-4), and
    the paper has 3e-6, with far longer training."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Random seed of initialisation, order and dropout."""
    workers: int = Field(1, ge=1)
    """Number of Ray Train workers. One needs no cluster. Several share each batch."""
    min_workers: int | None = Field(None, ge=1)
    """Continue with as few workers as this while nodes are missing; the result is the same but for rounding.
    By default wait for all workers."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """Arithmetic of the encoders, in evaluation too; all else stays in fp32. auto: bf16 on a CPU with bf16
    arithmetic, else fp32. tf32: a GPU's matrix products round their inputs to 10 bits."""
    compile: bool = False
    """Compile the encoders' layers with torch.compile. The first steps take a minute or more. It needs a C++
    compiler, and Triton on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto uses a GPU if there is one."""
    threads: int | None = Field(None, ge=1)
    """CPU threads per worker. By default all cores; one for a trial of a sweep."""
    train_rows: int | None = Field(None, ge=1)
    """Number of training examples to use, chosen by a fixed hash. By default all."""
    unlabelled: str | None = None
    """Further shards whose train news are texts without labels, prepared with the same tokeniser; folder or
    URL. Texts that `data` has too are left out."""
    unlabelled_share: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of a batch without labels: train news that no example uses (beyond `train_rows`, without a label,
    never shown to a user), and those of `unlabelled`. Task losses leave them out. If there are none, a batch
    has labelled ones only. An epoch is one pass over the labelled ones."""
    evaluate_every: int | None = Field(None, ge=1)
    """Also evaluate on validation every so many steps. It is done at the end of each epoch, too, unless
    `steps` is given."""
    log_every: int = Field(20, ge=1)
    """Steps between two entries in the log and in TensorBoard."""
    track: Literal["mlflow", "wandb"] | None = None
    """Also send all numbers to MLflow or Weights & Biases; a sweep is the parent of its trials."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """The values of the task and the method, overridden by those that are set."""
        if not isinstance(values, Mapping):
            return values
        task, method = str(values.get("task")), str(values.get("method"))
        return merge(
            methods.TASK_VALUES.get(task, {}),
            methods.METHODS.get(method, {}),
            methods.METHOD_TASK_VALUES.get((method, task), {}),
            values,
        )

    @model_validator(mode="after")
    def _values_fit(self) -> Self:
        if self.teacher.lower().endswith(VECTOR_FILES):
            raise ValueError(
                f"teacher {self.teacher}: the shards already contain the word vectors; set teacher "
                f"{SCRATCH}, or method glove"
            )
        if self.student.kind == "linear" and not (self.distill.alone and self.task == "topics"):
            raise ValueError("student.kind linear learns topics from labels only; set method linear")
        if self.before.method != "none" and not (
            self.distill.alone
            and (self.student.kind, self.student.encoder) == ("transformer", None)
            and self.student.layers > 0
        ):
            raise ValueError(
                f"before.method {self.before.method} needs a Transformer student that learns from labels "
                "only; set method finetune"
            )
        if self.compile and not self.distill.losses.isdisjoint(methods.ATTENTION_LOSSES):
            raise ValueError("compile: losses on attention read inside the layers; leave compile out")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is more than workers {self.workers}")
        self._check_unlabelled()
        parts = self.workers * self.optimizer.accumulate
        if self.batch_size < parts:
            raise ValueError(
                f"batch_size {self.batch_size} is less than workers x optimizer.accumulate = {parts}; "
                "each part of a batch needs at least one example"
            )
        return self

    @property
    def learning_rates(self) -> dict[str, float]:
        """Of teacher, student and top."""
        own, rate = self.optimizer, self.learning_rate
        usual = rate if self.teacher == SCRATCH else min(rate, TEACHER_RATE)
        return {
            "teacher": own.teacher_learning_rate or usual,
            "student": own.student_learning_rate or rate,
            "top": own.top_learning_rate or rate,
        }

    @property
    def unlabelled_size(self) -> int:
        """Texts without labels in a batch."""
        return self.batch_size - round(self.batch_size * (1 - self.unlabelled_share))

    def _check_unlabelled(self) -> None:
        share = f"unlabelled_share {self.unlabelled_share:g}"
        if self.unlabelled is not None and not self.unlabelled_share:
            raise ValueError(f"unlabelled {self.unlabelled}: has no effect; set unlabelled_share above 0")
        if not self.unlabelled_share:
            return
        if self.task == "retrieval":
            raise ValueError(f"{share}: task retrieval has no texts without a pair; set it to 0")
        if self.distill.losses <= {*methods.TEACHER_LOSSES, *methods.LABEL_LOSSES[self.task]}:
            what = "texts without labels" if self.task == "topics" else "news without clicks"
            raise ValueError(
                f"{share}: nothing learns from {what} with method {self.method}; set it to 0, or set "
                "distill.weights.news_embedding or another loss of distillation"
            )
        if self.unlabelled_size == self.batch_size:
            raise ValueError(f"{share} leaves no labelled example in a batch of {self.batch_size}; lower it")


class TextColumns(Settings):
    """How to read tables of texts."""

    text: str | None = None
    """Column of the text; several with commas between are joined. By default the first of title, text,
    headline, sentence, content and other usual names."""
    id: str | None = None
    """Column of the id. By default id, news_id, ..., else rows are numbered."""
    delimiter: str | None = Field(None, min_length=1, max_length=1)
    """Character between columns. By default a tab in .tsv, and in .csv the usual one of the first line."""
    encoding: str = "utf-8"
    """Encoding of text files, such as latin-1. UTF-16 is recognised by its first bytes."""


class ColumnSettings(TextColumns):
    """How to read tables and data sets of labelled texts."""

    label: str | None = None
    """Column of the label; `none` for texts without labels. By default label, category, topic, class, and
    other usual names. A row whose label is empty is a text without label."""


class PrepareSettings(Settings):
    """Tokenised Parquet shards from MIND's files, labelled texts, or tables of query-text pairs."""

    source: list[str] = Field(min_length=1)
    """MIND's folder or zip; a table (.tsv, .csv, .jsonl, .parquet; .gz) of texts and labels, or of query,
    text and clicked; a folder of LABEL/*.txt; a data set of the `datasets` library: a folder, or a name of
    the Hub (NAME or NAME:CONFIG). URLs of files too (s3://, gs://). Give one each for train, dev and test."""
    columns: ColumnSettings = ColumnSettings()
    """Columns and form of tables and data sets of labelled texts."""
    teacher: str
    """Encoder whose tokeniser to use: a Hugging Face name, a folder, or `scratch`; or a file of word vectors
    (of GloVe, fastText or word2vec; plain, .gz or .zip), whose words become the tokens."""
    out: str
    """Folder for the shards and manifest.json, or its URL."""
    max_tokens: int | None = Field(None, ge=3)
    """Longest title or text in tokens, with [CLS] and [SEP]; longer ones are cut. By default 30 for MIND's
    titles, 128 for other labelled texts and 512 for texts that queries clicked."""
    query_tokens: int = Field(30, ge=3)
    """Longest query of a table, in tokens."""
    validation_share: float = Field(0.1, gt=0.0, lt=0.5)
    """Share of the training data held out for validation: news and queries by a seeded hash, impressions by
    time, the last ones."""
    test_share: float = Field(0.1, gt=0.0, lt=0.5)
    """Share held out for test in the same way, if there is only one source; otherwise the later source is
    test."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the hash that splits the data."""
    max_rejected_share: float = Field(0.01, ge=0.0, le=1.0)
    """A larger share of bad lines in a file is an error."""
    scratch: ScratchSettings = ScratchSettings()
    """With teacher `scratch`: number of WordPieces to learn."""
    workers: int | None = Field(None, ge=0)
    """Ray Data tasks at once; 0 uses this process, without Ray. By default 0 for files of up to 32 MB in all,
    and as many as there are cores for larger ones."""
    overwrite: bool = False
    """Replace shards that were made from other sources or settings."""
