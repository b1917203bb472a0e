"""The linear model of method `linear`: TF-IDF of words and characters, and a linear SVM (scikit-learn).

It is the baseline that shows whether a Transformer pays on a corpus. Its files hold numbers and words only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from newsbert_ray.config import SettingsError
from newsbert_ray.data.batches import Ints, draw_examples, share_examples
from newsbert_ray.data.shards import Manifest, ShardError, Split, read_shard
from newsbert_ray.files import replace_folder
from newsbert_ray.model.encoder import EncoderError

MODEL, WEIGHTS = "linear.json", "linear.safetensors"
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Values of the SVM's C among which validation chooses; a larger one fits the training texts closer."""
_VIEWS: dict[str, dict[str, Any]] = {
    "words": {"analyzer": "word", "ngram_range": (1, 2), "sublinear_tf": True},
    "characters": {"analyzer": "char_wb", "ngram_range": (3, 5), "sublinear_tf": True},
}
"""What is counted: words and their pairs; 3 to 5 characters within a word."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LinearModel:
    """A linear classifier of texts.

    Attributes:
        vectorizers: of words and of characters; scikit-learn's, fitted.
        weights, bias: (F, Y) and (Y,), for F features and Y topics; 0 and -inf for a topic without texts.
        strength: the SVM's C.
        scale: factor on the scores that makes their softmax a probability.
    """

    vectorizers: tuple[Any, ...]
    weights: Floats
    bias: Floats
    labels: tuple[str, ...]
    strength: float
    scale: float = 1.0

    @property
    def parameters(self) -> int:
        """Numbers in the model, the weight of each feature (IDF) included."""
        return self.weights.size + self.bias.size + len(self.weights)

    def scores(self, texts: Sequence[str]) -> Floats:
        """Scores (M, Y) of M texts; the softmax of them is the probability of each topic."""
        return self.scores_of(features_of(self.vectorizers, texts))

    def scores_of(self, features: Any) -> Floats:
        scores: Floats = self.scale * (features @ self.weights) + self.bias
        return scores

    def save(self, folder: Path) -> None:
        from safetensors.numpy import save_file

        views = dict(zip(_VIEWS, self.vectorizers, strict=True))
        idf = {f"idf.{name}": vectorizer.idf_ for name, vectorizer in views.items()}
        arrays = {"weights": self.weights, "bias": self.bias, **idf}
        description = {
            "task": "topics",
            "labels": self.labels,
            "strength": self.strength,
            "scale": self.scale,
            **{name: vectorizer.get_feature_names_out().tolist() for name, vectorizer in views.items()},
        }
        with replace_folder(folder) as partial:
            contiguous = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
            save_file(contiguous, partial / WEIGHTS)
            (partial / MODEL).write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The model in `folder`; EncoderError if it is missing or damaged."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
        from sklearn.feature_extraction.text import TfidfVectorizer

        try:
            description = json.loads((folder / MODEL).read_text(encoding="utf-8"))
            arrays = load_file(folder / WEIGHTS)
            vectorizers = []
            for name, options in _VIEWS.items():
                vectorizer = TfidfVectorizer(**options, vocabulary=description[name])
                vectorizer.idf_ = arrays[f"idf.{name}"].astype(np.float64)
                vectorizers.append(vectorizer)
            labels, strength, scale = (description[name] for name in ("labels", "strength", "scale"))
            return cls(tuple(vectorizers), arrays["weights"], arrays["bias"], tuple(labels), strength, scale)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise EncoderError(
                f"{folder}: not a complete linear model ({type(error).__name__}); train the run again"
            ) from error


def labelled_texts(
    folder: str | Path, manifest: Manifest, split: Split, *, count: int | None = None
) -> tuple[list[str], Ints]:
    """The labelled titles of a split of prepared shards, and their topics (N,), positions in its labels; with
    `count` so many, those that any method would use. ShardError: there is none; SettingsError: fewer."""
    shards = manifest.require(split, "topics", folder=folder)
    texts: list[str] = []
    topics = []
    for shard, quota in zip(shards, share_examples(shards, count), strict=True):
        table = read_shard(folder, shard, ["news_id", "title", "label"])
        table = table.filter(pc.greater_equal(table.column("label"), 0))
        if quota < table.num_rows:
            table = table.take(draw_examples(table.column("news_id").to_pylist(), quota))
        texts += table.column("title").to_pylist()
        topics.append(table.column("label").to_numpy().astype(np.int64))
    if not texts:
        raise ShardError(f"{folder}: its {split} split has no labelled titles; prepare some with a topic")
    return texts, np.concatenate(topics)


def confusion_of(scores: Floats, topics: Ints) -> Ints:
    """Confusion matrix (Y, Y) of scores (M, Y) for topics (M,): rows are true topics, columns predicted."""
    count = scores.shape[1]
    return np.bincount(topics * count + scores.argmax(1), minlength=count * count).reshape(count, count)


def is_linear(folder: Path) -> bool:
    return (folder / MODEL).is_file()


def require_encoder(folder: Path) -> None:
    if is_linear(folder):
        raise EncoderError(
            f"{folder}: a linear model has no encoder and no embeddings; train with another method, such as "
            "finetune"
        )


def fit_linear(
    texts: Sequence[str],
    topics: Ints,
    labels: Sequence[str],
    validation: tuple[Sequence[str], Ints],
    *,
    seed: int = 0,
) -> Iterator[tuple[LinearModel, Floats]]:
    """A model of `texts` and `topics` (N,), positions in `labels`, for each of STRENGTHS, and its scores (M,
    Y) of the validation texts. The scores are scaled on `validation`: other texts and topics. SettingsError
    where all texts have the same topic."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    known = np.unique(topics)
    if len(known) < 2:
        raise SettingsError("method linear: all labelled texts have the same topic; label texts of another")
    vectorizers = tuple(TfidfVectorizer(**options).fit(texts) for options in _VIEWS.values())
    features, other = (features_of(vectorizers, many) for many in (texts, validation[0]))
    for strength in STRENGTHS:
        svm = LinearSVC(C=strength, random_state=seed).fit(features, topics)
        own, bias = svm.coef_.T, svm.intercept_
        if len(known) == 2:  # one vector separates both
            own, bias = np.hstack([-own, own]), np.concatenate([-bias, bias])
        weights = np.zeros((features.shape[1], len(labels)), np.float32)
        weights[:, known] = own
        all_bias = np.full(len(labels), -np.inf, np.float32)
        all_bias[known] = bias
        model = LinearModel(vectorizers, weights, all_bias, tuple(labels), strength)
        scale = _fit_scale(model.scores_of(other), validation[1])
        model = replace(model, bias=scale * all_bias, scale=scale)
        yield model, model.scores_of(other)


def _fit_scale(scores: Floats, topics: Ints) -> float:
    """The factor on `scores` whose softmax fits the topics best (least cross-entropy)."""
    from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]
    from scipy.special import log_softmax  # type: ignore[import-untyped]

    known = np.isfinite(scores[np.arange(len(topics)), topics])
    rows, own = scores[known].astype(np.float64), topics[known]
    if not len(rows):
        return 1.0

    def loss(exponent: float) -> float:
        return -float(log_softmax(np.exp(exponent) * rows, axis=1)[np.arange(len(own)), own].mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-2.0, 4.0), method="bounded").x))


def features_of(vectorizers: Sequence[Any], texts: Sequence[str]) -> Any:
    """Sparse features (M, F) in float32 of M texts."""
    from scipy.sparse import hstack  # type: ignore[import-untyped]

    return hstack([vectorizer.transform(texts) for vectorizer in vectorizers]).tocsr().astype(np.float32)
