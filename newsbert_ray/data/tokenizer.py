"""Texts -> token ids, by a pretrained encoder's tokeniser or a WordPiece vocabulary learned from the corpus.

The `tokenizers` library does the work. A folder with a tokenizer.json is read without transformers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from newsbert_ray.files import first_line

if TYPE_CHECKING:
    import tokenizers


SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
"""Special tokens of a learned vocabulary, in the order of their ids."""

_BATCH = 1024
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


class TokenizerError(ValueError):
    """A tokeniser that cannot be loaded or made. The text names it and the cure."""


class TitleTokenizer:
    """A tokeniser and its identity.

    Attributes:
        name: of its folder, or at Hugging Face.
        serialised, sha256: its form without padding and truncation, and that form's hash.
        vocabulary: number of tokens, added ones included.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, name: str, pad_id: int, origin: Any = None) -> None:
        backend.no_padding()
        backend.no_truncation()
        self.name = name
        self.pad_id = pad_id
        self.serialised: str = backend.to_str()
        self.sha256 = hashlib.sha256(self.serialised.encode()).hexdigest()
        self.vocabulary: int = backend.get_vocab_size(with_added_tokens=True)
        self._backend = backend
        self._origin = origin

    def encode(self, titles: Sequence[str], *, max_tokens: int) -> Iterator[list[int]]:
        """Token ids of each title with its special tokens, at most `max_tokens` long, unpadded."""
        self._backend.enable_truncation(max_tokens)
        for start in range(0, len(titles), _BATCH):
            for encoding in self._backend.encode_batch_fast(list(titles[start : start + _BATCH])):
                yield encoding.ids

    def save(self, folder: Path) -> None:
        """Write it as a Hugging Face tokeniser folder."""
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self._origin, Path):
            copied = [self._origin / name for name in _FILES] + sorted(self._origin.glob("*.model"))
            for path in copied:
                if path.is_file():
                    shutil.copyfile(path, folder / path.name)
        elif self._origin is not None:
            self._origin.save_pretrained(folder)
        else:
            _save_learned(self._backend, self.serialised, folder)


def load_tokenizer(teacher: str) -> TitleTokenizer:
    """The tokeniser of the encoder `teacher`, a folder or a Hugging Face name.

    Raises:
        TokenizerError: no such folder or name, or no tokeniser there that can be read.
    """
    folder = Path(teacher).expanduser()
    if (folder / "tokenizer.json").is_file():
        return _read_folder(folder)
    if not folder.is_dir() and (teacher.startswith(("/", ".", "~")) or teacher.count("/") > 1):
        raise TokenizerError(
            f"teacher {teacher}: no such folder; give an encoder's folder or name, or `scratch`"
        )
    return _load_with_transformers(teacher, folder)


def restore_tokenizer(serialised: str, *, name: str, pad_id: int) -> TitleTokenizer:
    """The tokeniser whose `serialised` form came from another process."""
    from tokenizers import Tokenizer

    return TitleTokenizer(Tokenizer.from_str(serialised), name=name, pad_id=pad_id)


def learn_tokenizer(titles: Callable[[], Iterator[str]], *, vocabulary: int) -> TitleTokenizer:
    """A lower-casing WordPiece tokeniser learned from `titles`; the same titles give the same vocabulary.

    Args:
        titles: gives the training titles; it is called twice.
        vocabulary: largest number of WordPieces, special tokens included; single characters are kept even
            beyond it.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The library numbers the pieces "##x" in the random order of a hash map and breaks ties by number, so the
    # same titles would give another vocabulary in each process. They get their numbers here instead.
    letters = {letter for title in titles() for letter in backend.normalizer.normalize_str(title)}
    pieces = [f"##{letter}" for letter in sorted(letters) if not letter.isspace()]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary, special_tokens=[*SPECIAL_TOKENS, *pieces], show_progress=False
    )
    backend.train_from_iterator(titles(), trainer=trainer)
    learned = Tokenizer(models.WordPiece(vocab=backend.get_vocab(), unk_token="[UNK]"))
    learned.normalizer, learned.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    learned.decoder = decoders.WordPiece(prefix="##")
    add_special_tokens(learned)
    return TitleTokenizer(learned, name="scratch", pad_id=0)


def add_special_tokens(backend: tokenizers.Tokenizer) -> None:
    """Make SPECIAL_TOKENS the ids 0 to 4, and let texts begin with [CLS] and end with [SEP]."""
    from tokenizers import processors

    backend.add_special_tokens(SPECIAL_TOKENS)
    cls, sep = SPECIAL_TOKENS.index("[CLS]"), SPECIAL_TOKENS.index("[SEP]")
    backend.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))


def _read_folder(folder: Path) -> TitleTokenizer:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare Exception
        raise TokenizerError(
            f"{path}: not a tokeniser ({error}); download the encoder's folder again"
        ) from error
    return TitleTokenizer(
        backend, name=folder.resolve().name, pad_id=_find_pad_id(folder, backend), origin=folder
    )


def _find_pad_id(folder: Path, backend: tokenizers.Tokenizer) -> int:
    names = [
        _read_json(folder / name).get("pad_token")
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    ]
    for name in [*names, "[PAD]", "<pad>"]:
        text = name.get("content") if isinstance(name, dict) else name
        token = backend.token_to_id(text) if isinstance(text, str) else None
        if token is not None:
            return int(token)
    return 0


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise TokenizerError(f"{path}: not JSON ({error}); download the encoder's folder again") from error
    return value if isinstance(value, dict) else {}


def _load_with_transformers(teacher: str, folder: Path) -> TitleTokenizer:
    from transformers import AutoTokenizer, BertTokenizer

    try:
        if (folder / "vocab.txt").is_file() and not (folder / "tokenizer_config.json").is_file():
            # As released with UniLMv2 and early BERTs, whose configuration names no class of tokeniser.
            loaded: Any = BertTokenizer.from_pretrained(str(folder), local_files_only=True)
        else:
            loaded = AutoTokenizer.from_pretrained(
                teacher, use_fast=True, trust_remote_code=False, local_files_only=folder.is_dir()
            )
    except Exception as error:
        # A missing file, the hub's answer, a missing package: the message is the same.
        fault = (
            "no tokeniser in this folder"
            if folder.is_dir()
            else "no such folder, and no such name could be loaded"
        )
        raise TokenizerError(
            f"teacher {teacher!r}: {fault} ({first_line(error)}); give a folder with a tokenizer.json, a "
            "Hugging Face name (that needs the network or a cached copy), or `scratch`"
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise TokenizerError(
            f"teacher {teacher!r}: has only a slow tokeniser; save it with a tokenizer.json first"
        )
    if not backend.get_vocab().keys() - set(loaded.get_added_vocab()):
        # transformers builds an empty one if the vocabulary's file is missing.
        raise TokenizerError(
            f"teacher {teacher!r}: its tokeniser knows no words, tokenizer.json or vocab.txt is missing; "
            "download the encoder's whole folder again"
        )
    name = folder.resolve().name if folder.is_dir() else teacher
    return TitleTokenizer(backend, name=name, pad_id=loaded.pad_token_id or 0, origin=loaded)


def _save_learned(backend: tokenizers.Tokenizer, serialised: str, folder: Path) -> None:
    """Write the files of a BERT tokeniser of transformers, or of one of whole words."""
    (folder / "tokenizer.json").write_text(serialised, encoding="utf-8")
    by_id = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in by_id), encoding="utf-8")
    whole_words = json.loads(serialised)["model"]["type"] == "WordLevel"
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast" if whole_words else "BertTokenizer",
        "do_lower_case": True,
        "model_max_length": 512,
        **{f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
