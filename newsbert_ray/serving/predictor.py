"""A trained student that reads texts: embeddings, topics, and rankings for a user.

Texts are sorted by length and read in batches with little padding. What many texts share is computed once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from newsbert_ray.config import SettingsError
from newsbert_ray.data.batches import Ints, cut_buckets
from newsbert_ray.data.shards import TextTable
from newsbert_ray.data.tokenizer import TitleTokenizer, load_tokenizer
from newsbert_ray.files import sha256_of
from newsbert_ray.model.encoder import Encoder, EncoderError
from newsbert_ray.model.heads import ClickHead, TopicHead
from newsbert_ray.model.linear import LinearModel, is_linear, require_encoder
from newsbert_ray.model.pair import Top
from newsbert_ray.model.saved import load_student
from newsbert_ray.model.word_models import StaticEncoder
from newsbert_ray.record import RunRecord, read_record
from newsbert_ray.storage.workdir import fetch

BATCH_TOKENS = 2048
"""Tokens of a batch on a processor: fitting a core's cache matters more than a large batch."""
BATCH_TOKENS_GPU = 1 << 15
"""Tokens of a batch on a GPU: enough to keep it busy."""
GROUP_TEXTS = 8192
"""Texts that are sorted together."""
CACHED_TOKENS = 1 << 17
"""Tokens of texts that share a cache: more need more memory (16 D bytes a token) and save more time."""
MIN_TEXTS = 64
"""For fewer texts a cache costs more time than it saves."""
NOT_NEEDED = ("checkpoints/*",)
"""Files of a run that a student does without."""

Floats = npt.NDArray[np.float32]
Precision = Literal["fp32", "bf16", "int8"]


@dataclass(frozen=True)
class Student:
    """A finished run's student; `task`: topics, recommendation or retrieval; `labels`: the topics, empty for
    another task; `max_tokens`: where texts are cut."""

    encoder: Encoder
    top: Top
    tokenizer: TitleTokenizer
    task: str
    labels: tuple[str, ...]
    max_tokens: int

    @classmethod
    def read(cls, folder: Path) -> Student:
        """The student in RUN/student; EncoderError or TokenizerError if it is incomplete."""
        encoder, top, description = load_student(folder)
        tokenizer = load_tokenizer(str(folder))
        if description.get("tokenizer_sha256") not in (None, tokenizer.sha256):
            raise EncoderError(
                f"{folder}: tokenizer.json is not the tokeniser that the student was trained with; copy it "
                "from the shards, or train the run again"
            )
        labels = tuple(description["labels"]) if isinstance(top.head, TopicHead) else ()
        max_tokens = int(description.get("max_tokens") or 512)
        return cls(encoder, top, tokenizer, description["task"], labels, max_tokens)


def read_run(run: str | Path) -> tuple[RunRecord, Path]:
    """The record of a finished run, and the folder of its student; a URL is downloaded, without checkpoints.
    RecordError: no finished run; EncoderError: a sweep did not keep this student."""
    folder = fetch(run, without=NOT_NEEDED)
    record = read_record(folder)
    if not (folder / "student").is_dir():
        raise EncoderError(f"{run}: its student was not kept (a sweep keeps its best ones); train it again")
    return record, folder / "student"


def load(run: str | Path, *, device: str | None = None, precision: Precision = "fp32") -> Predictor:
    """Load the student of a finished run.

    Args:
        run: folder of a finished run, or its URL.
        device: cpu or cuda; a GPU by default if there is one.
        precision: numbers that the encoder computes in; bf16 changes the third digit, int8 the second. With
            int8 a text's embedding depends a little on the texts that are read with it.
    Raises:
        RecordError, EncoderError, TokenizerError: no complete finished run.
    """
    return load_predictor(read_run(run)[1], device=device, precision=precision)


@lru_cache(maxsize=1)
def load_predictor(folder: Path, *, device: str | None = None, precision: Precision = "fp32") -> Predictor:
    """The student in a local folder, as `load`; the last one is kept for a process's next task."""
    return predictor_of(read_model(folder), device=device, precision=precision)


def read_model(folder: Path) -> Student | LinearModel:
    """What a run's student/ holds, as `load`."""
    return LinearModel.load(folder) if is_linear(folder) else Student.read(folder)


def predictor_of(
    model: Student | LinearModel, *, device: str | None = None, precision: Precision = "fp32"
) -> Predictor:
    """A model ready to read texts; a linear one always computes in fp32 on the processor."""
    if isinstance(model, LinearModel):
        return LinearPredictor(model)
    return Predictor(model, device=device, precision=precision)


class Prediction(NamedTuple):
    """The most probable topics of a text, best first, each with its probability."""

    topics: tuple[tuple[str, float], ...]

    @property
    def topic(self) -> str:
        """The most probable one."""
        return self.topics[0][0]

    @property
    def probability(self) -> float:
        """Of this topic."""
        return self.topics[0][1]


@dataclass(frozen=True)
class Ranked:
    """A candidate: its index in the list of candidates, its text and score."""

    index: int
    text: str
    score: float


class Predictor:
    """A student with its tokeniser, ready to read texts. Not for several threads at once. `width`: numbers of
    an embedding, D; 0 for a linear model."""

    def __init__(self, student: Student, *, device: str | None = None, precision: Precision = "fp32") -> None:
        """The head stays in fp32, whatever the encoder computes in, and the pooling except with int8.
        SettingsError: int8 on a GPU."""
        self.device = torch.device(device or ("cpu" if precision == "int8" else best_device()))
        self.precision = precision
        on_cpu = self.device.type == "cpu"
        if precision == "int8" and not on_cpu:
            raise SettingsError("precision int8 is for the processor; use bf16 on a GPU")
        numbers = torch.bfloat16 if precision == "bf16" else torch.float32
        self.encoder = student.encoder.to(self.device, numbers).eval()
        self.width = self.encoder.hidden_size
        self.top = student.top.to(self.device).eval()
        self.tokenizer, self.max_tokens = student.tokenizer, student.max_tokens
        self.task, self.labels = student.task, student.labels
        self._batch_tokens = BATCH_TOKENS if on_cpu else BATCH_TOKENS_GPU
        # Maps in int8 are faster than the cache.
        self._cache = TokenCache.of(self.encoder) if on_cpu and precision != "int8" else None
        self._words = None
        if isinstance(self.encoder, StaticEncoder):
            self._words = self.encoder.weighted_vectors(self.top.pooling)
        elif precision == "int8":
            _round_weights(self.encoder.layers)
            _round_weights(self.top.pooling)

    def embed(self, texts: Sequence[str]) -> Floats:
        """Embeddings (M, D) of M texts, in their order."""
        embeddings = np.empty((len(texts), self.width), dtype=np.float32)
        for start in range(0, len(texts), GROUP_TEXTS):
            embeddings[start : start + GROUP_TEXTS] = self._embed_group(texts[start : start + GROUP_TEXTS])
        return embeddings

    def predict(self, texts: Sequence[str], *, top: int = 1) -> list[Prediction]:
        """The `top` most probable topics of each text; SettingsError if the student learned another task."""
        if not isinstance(self.top.head, TopicHead):
            raise SettingsError(f"this student learned {self.task}, not topics; use embed or rank")
        with torch.inference_mode():
            logits = self.top.head.dense(torch.from_numpy(self.embed(texts)).to(self.device))
            return self._best(logits, top)

    def rank(self, history: Sequence[str], candidates: Sequence[str]) -> list[Ranked]:
        """Candidates for a user who read the texts in `history`, best first, by the click score of a
        recommendation student, else by the cosine to the mean of the history."""
        scores = self.user_scores(self.embed(history), self.embed(candidates))
        order = np.argsort(-scores, kind="stable").tolist()
        return [Ranked(index, candidates[index], float(scores[index])) for index in order]

    def user_scores(self, history: Floats, candidates: Floats) -> Floats:
        """Scores (M,) of candidates (M, D) for a user with a history (T, D); by cosine T must not be 0."""
        if not isinstance(self.top.head, ClickHead):
            return cosine_to_mean(history, candidates)
        with torch.inference_mode():
            read = torch.from_numpy(history).to(self.device)[None]
            user = self.top.head.encode_users(read, torch.ones(1, len(history), device=self.device))[0]
        scores: Floats = candidates @ user.cpu().numpy()
        return scores

    def _best(self, logits: Tensor, top: int) -> list[Prediction]:
        """The `top` most probable topics of each row of logits (M, Y)."""
        best = torch.softmax(logits, -1).topk(min(top, len(self.labels)), dim=-1)
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [
            Prediction(tuple((self.labels[n], p) for n, p in zip(numbers, probabilities, strict=True)))
            for numbers, probabilities in rows
        ]

    @torch.inference_mode()
    def _embed_group(self, texts: Sequence[str]) -> Floats:
        ids = list(self.tokenizer.encode(texts, max_tokens=self.max_tokens))
        flat, offsets = np.fromiter(chain.from_iterable(ids), np.int32), np.cumsum([0, *map(len, ids)])
        if self._words is not None:
            return self._add_words(flat, offsets, self._words)
        table, lengths = TextTable(flat, offsets), np.diff(offsets)
        order = np.argsort(lengths, kind="stable")
        embeddings = np.empty((len(ids), self.width), dtype=np.float32)
        buckets = list(cut_buckets(lengths[order], budget=self._batch_tokens))
        for cuts in _group_buckets(buckets, lengths[order]):
            batches = [table.ids(order[start:stop], pad_id=self.tokenizer.pad_id) for start, stop in cuts]
            padded = [ids for ids, _ in batches]
            is_worth_it = sum(map(len, padded)) >= MIN_TEXTS
            with self._cache.fill(padded) if self._cache and is_worth_it else nullcontext():
                for (start, stop), batch in zip(cuts, batches, strict=True):
                    embeddings[order[start:stop]] = self._read(*batch)
        return embeddings

    def _add_words(self, flat: npt.NDArray[np.int32], offsets: Ints, words: Tensor) -> Floats:
        """Embeddings of a student without layers, by its `weighted_vectors`: no padding, no pooling."""
        tokens, starts = (torch.from_numpy(a).to(self.device).long() for a in (flat, offsets[:-1]))
        sums = F.embedding_bag(tokens, words, starts, mode="sum")
        embeddings: Floats = (sums[:, :-1] / sums[:, -1:]).cpu().numpy()
        return embeddings

    def _read(self, ids: Ints, mask: npt.NDArray[np.bool_]) -> Floats:
        """Token ids (B, L) and mask to embeddings (B, D)."""
        ids_, mask_ = (torch.from_numpy(array).to(self.device).long() for array in (ids, mask))
        if type(self.encoder) is Encoder and mask.all():  # attention without a mask takes a third less time
            last = self.encoder.backbone(input_ids=ids_).last_hidden_state
        else:
            last = self.encoder(ids_, mask_)[-1]
        embeddings: Floats = self.top.embed((last,), mask_).cpu().numpy()
        return embeddings


class LinearPredictor(Predictor):
    """The linear model of method `linear`: it predicts topics and has no embeddings."""

    def __init__(self, model: LinearModel) -> None:
        self.model, self.device, self.precision = model, torch.device("cpu"), "fp32"
        self.task, self.labels, self.width = "topics", model.labels, 0

    def embed(self, texts: Sequence[str]) -> Floats:
        """Not possible."""
        raise SettingsError("a linear model has no embeddings; train with another method, such as finetune")

    def predict(self, texts: Sequence[str], *, top: int = 1) -> list[Prediction]:
        """The `top` most probable topics of each text."""
        return self._best(torch.from_numpy(self.model.scores(texts)), top) if len(texts) else []


def cosines(embeddings: Floats, vector: Floats) -> Floats:
    """Cosines (M,) of embeddings (M, D) with one vector (D,)."""
    norms = np.linalg.norm(embeddings, axis=1) * np.linalg.norm(vector)
    result: Floats = embeddings @ vector / np.maximum(norms, np.finfo(np.float32).tiny)
    return result


def cosine_to_mean(history: Floats, embeddings: Floats) -> Floats:
    """Cosines (M,) of embeddings (M, D) with the mean direction of a history (T, D)."""
    directions = history / np.linalg.norm(history, axis=1, keepdims=True)
    return cosines(embeddings, directions.mean(0))


def weights_hash(folder: Path) -> str:
    """SHA-256 of a student's weights, which tells embeddings of different models apart."""
    require_encoder(folder)
    return sha256_of(folder / "model.safetensors")


def best_device() -> str:
    """A GPU if this process has one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _group_buckets(cuts: Sequence[tuple[int, int]], lengths: Ints) -> list[list[tuple[int, int]]]:
    """Buckets (start, stop) of ascending `lengths`, in groups of about CACHED_TOKENS that share a cache."""
    sizes = [(stop - start) * int(lengths[stop - 1]) for start, stop in cuts]
    numbers = (np.cumsum(sizes) // CACHED_TOKENS).tolist()
    pairs = groupby(zip(numbers, cuts, strict=True), itemgetter(0))
    return [[cut for _, cut in group] for _, group in pairs]


def _round_weights(model: nn.Module) -> None:
    """Replace a model's linear maps by maps in 8-bit integers."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, _Int8Linear(child))


class _Int8Linear(nn.Module):
    """A linear map with weights of 8 bits, one scale an output; inputs are rounded with one scale a batch."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scales = weight.abs().amax(1).clamp_min(torch.finfo(weight.dtype).tiny) / 127
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces another form of such weights, and has none yet
            rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
            self._packed = torch.ops.quantized.linear_prepack(rounded, linear.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        # 7 bits of the inputs, as 8 overflow on processors without 8-bit arithmetic.
        outputs: Tensor = torch.ops.quantized.linear_dynamic(inputs, self._packed, reduce_range=True)
        return outputs


class _Lookup(nn.Module):
    """Replaces a module: returns rows of its precomputed outputs, those of the next batch at each call."""

    def __init__(self, table: Tensor, batches: Iterable[Tensor]) -> None:
        super().__init__()
        self.table = table  # (U, D), a row for each distinct token and position
        self.batches = iter(batches)  # row numbers (B, L) of each batch

    def forward(self, *_args: Any, **_kwargs: Any) -> Tensor:
        rows = next(self.batches)
        return self.table.index_select(0, rows.flatten()).view(*rows.shape, -1)


class TokenCache:
    """Caches a BERT's embeddings and first-layer queries, keys and values per (token, position): only these
    depend on one token alone. Each distinct pair is computed once for all texts of a group."""

    def __init__(self, encoder: Encoder) -> None:
        attention = cast("Any", encoder.layers[0]).attention.self
        self._modules: list[tuple[Any, str]] = [(encoder.backbone, "embeddings")]
        self._modules += [(attention, name) for name in ("query", "key", "value")]

    @classmethod
    def of(cls, encoder: Encoder) -> TokenCache | None:
        """The cache of an encoder; None if it is not a BERT."""
        is_bert = type(encoder) is Encoder and encoder.backbone.config.model_type == "bert"
        return cls(encoder) if is_bert and len(encoder.layers) else None

    @contextmanager
    def fill(self, batches: Sequence[Ints]) -> Iterator[None]:
        """Within this context the encoder uses values computed for these batches of token ids (B, L). It must
        read them in this order, each once."""
        stride = max(batch.shape[1] for batch in batches)
        keys = [(batch * stride + np.arange(batch.shape[1])).ravel() for batch in batches]
        pairs, inverse = np.unique(np.concatenate(keys), return_inverse=True)
        tables = self._compute(torch.from_numpy(pairs // stride), torch.from_numpy(pairs % stride))
        parts = np.split(inverse, np.cumsum(list(map(len, keys)))[:-1])
        rows = [torch.from_numpy(part).view(b.shape) for part, b in zip(parts, batches, strict=True)]
        originals = [getattr(parent, name) for parent, name in self._modules]
        try:
            for (parent, name), table in zip(self._modules, tables, strict=True):
                setattr(parent, name, _Lookup(table, rows))
            yield
        finally:
            for (parent, name), module in zip(self._modules, originals, strict=True):
                setattr(parent, name, module)

    @torch.inference_mode()
    def _compute(self, tokens: Tensor, positions: Tensor) -> list[Tensor]:
        """Embeddings, queries, keys, values (U, D) of U tokens at their positions. Only the norm's scale
        mixes both: each map is applied to distinct tokens and to positions, and the outputs are added."""
        embed, *maps = (getattr(parent, name) for parent, name in self._modules)
        norm = embed.LayerNorm
        words, word = torch.unique(tokens, return_inverse=True)
        indices = torch.arange(int(positions.max()) + 1)
        of_words = _centre(embed.word_embeddings(words) + embed.token_type_embeddings.weight[0])
        of_positions = _centre(embed.position_embeddings(indices))
        sums = of_words[word].add_(of_positions[positions])
        scale = sums.square().mean(-1, keepdim=True).add_(norm.eps).rsqrt_()
        tables = [sums.mul_(scale).mul_(norm.weight).add_(norm.bias)]
        for linear in maps:
            weight = linear.weight * norm.weight
            outputs = F.linear(of_words, weight)[word].add_(F.linear(of_positions, weight)[positions])
            tables.append(outputs.mul_(scale).add_(linear(norm.bias)))
        return tables


def _centre(vectors: Tensor) -> Tensor:
    return vectors - vectors.mean(-1, keepdim=True)
