"""The training loops that `bench_peers` compares: ours, and those of other libraries, over the same models.

Each loop is called with what it starts from, a function that it calls before each step, and one that it gives
its student to. It ends by an exception of the former.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from newsbert_ray.config import TrainSettings, build_settings, merge
from newsbert_ray.data.reading import World, make_schedule, read_updates
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.model.assemble import assemble_pair
from newsbert_ray.model.encoder import Encoder
from newsbert_ray.model.heads import TopicHead
from newsbert_ray.model.pair import Pair, Top
from newsbert_ray.model.saved import write_student
from newsbert_ray.training.checkpoint import Progress
from newsbert_ray.training.loop import TrainingLoop
from newsbert_ray.training.worker import build_worker_learner, cached_teacher

RATE = 1e-4
ENDLESS = 5000
"""Steps of a training run that does not come to its end."""
Wait = Callable[[], None]
"""Called before each step; returns when it is the program's turn."""
Keep = Callable[["Classifier"], None]
"""Called once, with the student that will learn."""


class Feed(list[Any]):
    """Batches, each of which waits for its program's turn."""

    def __init__(self, batches: Sequence[Any], wait: Wait) -> None:
        super().__init__(batches)
        self._wait_for_turn = wait

    def __iter__(self) -> Iterator[Any]:
        for index in range(len(self)):
            self._wait_for_turn()
            yield self[index]


class Classifier(nn.Module):
    """A stock encoder of transformers under our pooling and head, with outputs as peers expect."""

    def __init__(self, encoder: Encoder, top: Top) -> None:
        super().__init__()
        self.backbone, self.top = encoder.backbone, top
        self._layers = [*encoder.layers]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Any]:
        states = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True
        ).hidden_states
        embedding = self.top.pooling(states[-1], attention_mask)
        logits = cast("TopicHead", self.top.head).dense(embedding)
        loss = {} if labels is None else {"loss": F.cross_entropy(logits, labels)}
        return {**loss, "logits": logits, "hidden_states": states, "embedding": embedding}

    def path(self, level: int) -> str:
        """The module whose output is this hidden state."""
        module = self._layers[level - 1] if level else self.backbone.embeddings
        (path,) = [name for name, found in self.named_modules() if found is module]
        return str(path)


@dataclass
class Given:
    """What all programs start from.

    Attributes:
        values: settings of our runs.
        matches: compared hidden states (student's, teacher's): the embedding layer's, then each layer's.
        batches: of the peers; the same as ours.
    """

    values: dict[str, Any]
    folder: Path
    matches: list[tuple[int, int]]
    batches: list[dict[str, Tensor]] = field(default_factory=list)

    @classmethod
    def make(cls, values: Mapping[str, Any], folder: Path, *, batches: int) -> Given:
        """Read the batches, and write the teacher as a finished run, which the frozen methods ask for.

        Args:
            values: settings of data, teacher, student.layers, batch_size and threads.
        """
        common = {
            "out": str(folder / "run"), "train_rows": batches * int(values["batch_size"]),
            "model.dropout": 0.0, "learning_rate": RATE, "steps": ENDLESS, "evaluate_every": ENDLESS,
            "checkpoint.every_minutes": None, "optimizer.decay": "none", "optimizer.warmup_share": 0.0,
            "optimizer.teacher_learning_rate": RATE,
        }  # fmt: skip
        given = cls(merge(values, common), folder, [])
        settings = given.settings()
        manifest = read_manifest(settings.data)
        pair = assemble_pair(settings, manifest)
        layers, depth = len(pair.student.layers), len(pair.teacher.layers)
        given.matches = [(level, level * depth // layers) for level in range(layers + 1)]
        write_student(
            folder / "teacher" / "student",
            Pair(pair.teacher, pair.teacher, pair.top, alone=True),
            manifest,
            tokenizer=Path(settings.data) / "tokenizer",
        )
        for update in itertools.islice(read_updates(make_schedule(settings, manifest)), batches):
            (bucket,) = update.parts[0].buckets
            texts = {"input_ids": bucket.input_ids, "attention_mask": bucket.attention_mask}
            given.batches.append({**texts, "labels": update.parts[0].target.labels})
        return given

    def settings(self, method: str = "newsbert", **values: Any) -> TrainSettings:
        frozen = {} if method == "newsbert" else {"distill.teacher_run": str(self.folder / "teacher")}
        return build_settings(TrainSettings, merge(self.values, {"method": method}, frozen, values))

    def models(self, *, joint: bool = False) -> tuple[Classifier, Classifier]:
        """Teacher and student as our runs start them: under one top, or the teacher frozen with its own."""
        settings = self.settings("newsbert" if joint else "twinbert")
        pair = copy.deepcopy(assemble_pair(settings, read_manifest(settings.data)))
        teacher = Classifier(pair.teacher, pair.teacher_top or pair.top)
        return teacher.train(joint), Classifier(pair.student, pair.top)

    def trainer_arguments(self) -> dict[str, Any]:
        """transformers' TrainingArguments; its Adam is the fused one already."""
        return {
            "output_dir": str(self.folder / "trainer"), "use_cpu": True, "max_steps": ENDLESS,
            "learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
            "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        }  # fmt: skip


def ours(given: Given, wait: Wait, keep: Keep, *, stored: bool = False, **values: Any) -> None:
    """Our training loop, without what a run writes to files."""
    settings = given.settings(**values)
    schedule = make_schedule(settings, read_manifest(settings.data))
    learner = build_worker_learner(settings, schedule, World())
    pair = learner.pair
    if stored:
        pair.teacher_cache = cached_teacher(pair, schedule, World(), say=lambda _: None)
    keep(Classifier(pair.student, pair.top))
    updates = list(itertools.islice(read_updates(schedule), len(given.batches)))
    endless = (replace(update, step=step) for step, update in enumerate(itertools.cycle(updates), 1))
    loop = TrainingLoop(
        learner,
        schedule,
        Progress(),
        World(),
        evaluate=dict,
        report=lambda _: wait(),
        checkpoints=given.folder / "checkpoints",
        leaving=str,
    )
    wait()
    loop.run(endless)


def trainer(
    given: Given, wait: Wait, keep: Keep, *, joint: bool = False, hidden: bool = False, stored: bool = False
) -> None:
    """transformers' Trainer with a compute_loss that distils."""
    from transformers import Trainer, TrainingArguments

    teacher, student = given.models(joint=joint)
    keep(student)
    matches, batches = given.matches if hidden or joint else [], given.batches
    if stored:
        batches = [{**batch, "stored": logits_of(teacher, batch)} for batch in batches]

    class Distiller(Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return Feed(batches, wait)

        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            texts = {name: inputs[name] for name in given.batches[0]}
            with torch.set_grad_enabled(joint):
                other = {"logits": inputs["stored"]} if stored else teacher(**texts)
            return distilled(model["student"](**texts), other, texts, matches, joint=joint)

    learning = {"student": student, "teacher": teacher} if joint else {"student": student}
    Distiller(nn.ModuleDict(learning), TrainingArguments(**given.trainer_arguments())).train()


def distilled(
    own: Mapping[str, Any],
    other: Mapping[str, Any],
    inputs: Mapping[str, Tensor],
    matches: Sequence[tuple[int, int]],
    *,
    joint: bool,
) -> Tensor:
    """A student's loss by both models' outputs; `joint` adds the embeddings', and the teacher's own."""
    losses = [own["loss"], soft_label_loss(own["logits"], other["logits"].detach())]
    for i, k in matches:
        losses.append(token_mse(own["hidden_states"][i], other["hidden_states"][k].detach(), inputs))
    if joint:
        losses += [other["loss"], F.mse_loss(own["embedding"], other["embedding"].detach())]
    return torch.stack(losses).sum()


@torch.no_grad()
def logits_of(teacher: Classifier, batch: Mapping[str, Tensor]) -> Tensor:
    logits: Tensor = teacher(**batch)["logits"]
    return logits


def soft_label_loss(student: Tensor, teacher: Tensor) -> Tensor:
    return -(torch.softmax(teacher, -1) * torch.log_softmax(student, -1)).sum(-1).mean()


def token_mse(student: Tensor, teacher: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    return (student - teacher).square().mean(-1)[inputs["attention_mask"].bool()].mean()


def textbrewer(given: Given, wait: Wait, keep: Keep, *, hidden: bool = False, stored: bool = False) -> None:
    """TextBrewer's distillers; `stored` is its cache of logits, which shuffles the batches."""
    from textbrewer import BasicDistiller, DistillationConfig, GeneralDistiller, TrainingConfig

    teacher, student = given.models()
    keep(student)
    matches = [
        {"layer_T": k, "layer_S": i, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
        for i, k in given.matches
    ]

    def adapt(batch: Any, outputs: Any) -> dict[str, Any]:
        adapted = {"logits": outputs["logits"], "losses": outputs["loss"]}
        more = {"hidden": outputs["hidden_states"], "inputs_mask": batch["attention_mask"]} if hidden else {}
        return {**adapted, **more}

    distiller = (GeneralDistiller if hidden else BasicDistiller)(
        TrainingConfig(output_dir=str(given.folder / "textbrewer"), device="cpu", ckpt_steps=ENDLESS),
        DistillationConfig(
            temperature=1,
            hard_label_weight=1,
            intermediate_matches=matches if hidden else None,
            is_caching_logits=stored,
        ),
        teacher,
        student,
        adapt,
        adapt,
    )
    adam = torch.optim.Adam(student.parameters(), lr=RATE, fused=True)
    with distiller:
        if stored:
            distiller.logits_cache = Feed([], wait)
            distiller.train(adam, given.batches, num_epochs=ENDLESS)
        else:
            distiller.train(adam, Feed(given.batches, wait), num_steps=ENDLESS)


def torchdistill(given: Given, wait: Wait, keep: Keep, *, hidden: bool = False) -> None:
    """torchdistill's box, in the loop that its examples write."""
    from torchdistill.core.distillation import DistillationBox

    teacher, student = given.models()
    keep(student)
    head = "top.head.dense"
    paths = [(student.path(i), teacher.path(k)) for i, k in given.matches] if hidden else []
    terms: dict[str, Any] = {
        "labels and soft labels": {
            "criterion": {
                "key": "KDLoss",
                "kwargs": {
                    "student_module_path": head,
                    "student_module_io": "output",
                    "teacher_module_path": head,
                    "teacher_module_io": "output",
                    "temperature": 1.0,
                    "alpha": 0.5,
                },
            },
            "weight": 2.0,
        },
        **{own: mse(own, other) for own, other in paths},
    }
    models = [
        {"forward_proc": "forward_batch_only_as_kwargs", "forward_hook": {"output": [head, *own]}}
        for own in ([other for _, other in paths], [own for own, _ in paths])
    ]
    config = {
        "num_epochs": ENDLESS,
        "teacher": {**models[0], "requires_grad": False},
        "student": models[1],
        "optimizer": {"key": "Adam", "kwargs": {"lr": RATE, "fused": True}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }
    box = DistillationBox(teacher, student, {}, config, torch.device("cpu"), None, False, 1)
    while True:
        for batch in Feed(given.batches, wait):
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            box.post_forward_process(box.forward_process(inputs, batch["labels"], None))


def mse(student: str, teacher: str) -> dict[str, Any]:
    """torchdistill's MSE between the outputs of two modules."""
    return {
        "criterion": {"key": "MSELoss", "kwargs": {}},
        "criterion_wrapper": {
            "key": "SimpleLossWrapper",
            "kwargs": {
                "input": {"is_from_teacher": False, "module_path": student, "io": "output"},
                "target": {"is_from_teacher": True, "module_path": teacher, "io": "output"},
            },
        },
        "weight": 1.0,
    }


def sentence_transformers(given: Given, wait: Wait, keep: Keep) -> None:
    """Sentence Transformers' trainer: the teacher with fewer layers learns the teacher's embeddings."""
    import sentence_transformers as st
    from sentence_transformers.sentence_transformer import losses, modules

    encoder = modules.Transformer(str(given.folder / "teacher" / "student"))
    teacher = st.SentenceTransformer(
        modules=[encoder, modules.Pooling(encoder.get_embedding_dimension())], device="cpu"
    )
    student = copy.deepcopy(teacher)
    backbone: Any = student[0].auto_model
    backbone.config.num_hidden_layers = len(given.matches) - 1
    backbone.encoder.layer = backbone.encoder.layer[: len(given.matches) - 1]
    batches = []
    for batch in given.batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            label = teacher(dict(inputs))["sentence_embedding"]
        batches.append({**{f"text_{name}": value for name, value in inputs.items()}, "label": label})

    class Distiller(st.SentenceTransformerTrainer):
        def get_train_dataloader(self) -> Any:
            return Feed(batches, wait)

    arguments = st.SentenceTransformerTrainingArguments(**given.trainer_arguments())
    Distiller(student, arguments, loss=losses.MSELoss(student)).train()
