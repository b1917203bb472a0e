"""Texts -> token ids, by a pretrained encoder's tokeniser, WordPieces of the corpus, or whole words.

The `tokenizers` library does the work. A folder with a tokenizer.json is read without transformers. Knows no
tensor and no Ray.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from newsbert_ray.config import ENCODERS
from newsbert_ray.files import first_line

if TYPE_CHECKING:
    import tokenizers

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
"""Special tokens of a learned vocabulary, in the order of their ids."""

_BATCH = 1024
_CASED_SHARE = 0.01
"""A vocabulary with a larger share of words with capitals is cased."""
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
    """A tokeniser and its identity: `name`, of its folder or at Hugging Face; `serialised`, its form without
    padding and truncation, and `sha256`, its hash; `vocabulary`, the number of tokens with added ones."""

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

    def special_ids(self) -> tuple[list[int], list[int]]:
        """Ids that every text begins with, such as [CLS], and those that it ends with."""
        none, letter = self.encode(["", "a"], max_tokens=16)
        start = next((n for n in range(len(letter)) if none[n : n + 1] != letter[n : n + 1]), 0)
        return none[:start], none[start:]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self._origin, Path):
            copied = [self._origin / name for name in _FILES] + sorted(self._origin.glob("*.model"))
            for path in copied:
                if path.is_file():
                    shutil.copyfile(path, folder / path.name)
        elif self._origin is not None:
            self._origin.save_pretrained(folder)
            (folder / "tokenizer.json").write_text(self.serialised, encoding="utf-8")
        else:
            _save_learned(self._backend, self.serialised, folder)


def load_tokenizer(teacher: str) -> TitleTokenizer:
    """The tokeniser of an encoder, a folder or a Hugging Face name; TokenizerError where none can be read."""
    from tokenizers import Tokenizer

    folder = Path(teacher).expanduser()
    if not folder.is_dir() and (teacher.startswith(("/", ".", "~")) or teacher.count("/") > 1):
        raise TokenizerError(
            f"teacher {teacher}: no such folder; give an encoder's folder or name, or `scratch`"
        )
    path = folder / "tokenizer.json"
    if not path.is_file():
        return _load_with_transformers(teacher, folder)
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare Exception
        fault = f"{path}: not a tokeniser ({error}); download the encoder's folder again"
        raise TokenizerError(fault) from error
    pad_id = _find_pad_id(folder, backend)
    return TitleTokenizer(backend, name=folder.resolve().name, pad_id=pad_id, origin=folder)


@lru_cache(maxsize=1)
def restore_tokenizer(serialised: str, *, name: str, pad_id: int) -> TitleTokenizer:
    """The tokeniser whose `serialised` form came from another process, made once in this one."""
    from tokenizers import Tokenizer

    return TitleTokenizer(Tokenizer.from_str(serialised), name=name, pad_id=pad_id)


def learn_tokenizer(titles: Callable[[], Iterator[str]], *, vocabulary: int) -> TitleTokenizer:
    """A lower-casing WordPiece tokeniser learned from `titles`, which is called twice; the same titles give
    the same vocabulary: at most `vocabulary` WordPieces, special tokens included, but for single characters.
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
    from tokenizers import processors

    backend.add_special_tokens(SPECIAL_TOKENS)
    cls, sep = SPECIAL_TOKENS.index("[CLS]"), SPECIAL_TOKENS.index("[SEP]")
    backend.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))


def _find_pad_id(folder: Path, backend: tokenizers.Tokenizer) -> int:
    configs = [_read_json(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    for name in [*(config.get("pad_token") for config in configs), "[PAD]", "<pad>"]:
        text = name.get("content") if isinstance(name, dict) else name
        if isinstance(text, str) and (token := backend.token_to_id(text)) is not None:
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
    import tokenizers
    from transformers import AutoTokenizer, BertTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    # UniLMv2 and early BERTs were released without a configuration that names the class of tokeniser.
    is_bert = (folder / "vocab.txt").is_file() and not (folder / "tokenizer_config.json").is_file()
    read = partial(
        (BertTokenizer if is_bert else AutoTokenizer).from_pretrained,
        str(folder) if is_bert else teacher,
        trust_remote_code=False,
        local_files_only=folder.is_dir(),
    )
    try:
        loaded: Any = read(do_lower_case=True) if is_bert else read()  # not every version has it by default
        if "do_lower_case" not in get_tokenizer_config(teacher) and _loses_capitals(loaded):
            loaded = read(do_lower_case=False)
    except Exception as error:
        # A missing file, the hub's answer, a missing package: the message is the same.
        of_sentencepiece = any(folder.glob("*.model")) if folder.is_dir() else "tiktoken" in str(error)
        if of_sentencepiece and find_spec("sentencepiece") is None:
            raise TokenizerError(
                f"teacher {teacher!r}: its tokeniser needs a package more: pip install sentencepiece"
            ) from error
        fault = "no tokeniser in this folder" if folder.is_dir() else "no such folder, and no name that loads"
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
    # The library rounds the scores of a Unigram model when it reads them; read once, they stay as they are.
    backend = tokenizers.Tokenizer.from_str(backend.to_str())
    return TitleTokenizer(backend, name=name, pad_id=loaded.pad_token_id or 0, origin=loaded)


def _loses_capitals(tokenizer: Any) -> bool:
    """Whether texts are put in lower case although the vocabulary, besides special tokens, has capitals."""
    words = tokenizer.get_vocab().keys() - set(tokenizer.get_added_vocab())
    cased = sum(word != word.lower() for word in words if word[:1] not in "[<")
    return cased > _CASED_SHARE * len(words) and bool(tokenizer.tokenize("The") == tokenizer.tokenize("the"))


def check_encoder(teacher: str, tokenizer: TitleTokenizer) -> None:
    """Refuse, by a TokenizerError, an encoder of a family that is not supported, or with fewer word
    embeddings than tokens, as far as its configuration tells."""
    folder = Path(teacher).expanduser()
    config = _read_json(folder / "config.json")
    if not folder.is_dir():
        from transformers import PretrainedConfig

        with suppress(OSError):  # only the tokeniser is at hand
            config = PretrainedConfig.get_config_dict(teacher)[0]
    kind, size = config.get("model_type"), config.get("vocab_size")
    if kind not in (None, *ENCODERS):
        raise TokenizerError(
            f"teacher {teacher}: an encoder of type {kind!r} is not supported; supported are "
            + ", ".join(ENCODERS)
        )
    if isinstance(size, int) and size < tokenizer.vocabulary:
        raise TokenizerError(
            f"teacher {teacher}: its tokeniser has {tokenizer.vocabulary:,} tokens, and the encoder only "
            f"{size:,} word embeddings; give the tokeniser that the encoder was trained with"
        )


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
