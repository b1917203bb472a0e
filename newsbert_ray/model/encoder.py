"""A Hugging Face encoder as an embedding layer and a list of Transformer layers."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "model.safetensors"
_PROJECTION_NAMES = (
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
)
"""Names of the query, key and value maps in different encoder families."""


class Projections(NamedTuple):
    """Inputs of one layer's attention: query, key and value (B, heads, L, D / heads), and in encoders with
    relative positions a bias (heads, L, L) that is added to the scaled scores."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None = None

    def float(self) -> Projections:
        bias = None if self.bias is None else self.bias.float()
        return Projections(self.query.float(), self.key.float(), self.value.float(), bias)


class States(NamedTuple):
    """An encoder's outputs: n + 1 hidden states (B, L, D) and, on request, n layers' projections."""

    hidden: tuple[Tensor, ...]
    projections: tuple[Projections, ...] = ()


class EncoderError(ValueError):
    """An encoder that cannot be loaded, used or written; the message gives reason and remedy."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and reports of transformers meanwhile: a missing weight is our own error."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


class Encoder(nn.Module):
    """An encoder with named access to its layers, its word embeddings and its projections."""

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        if getattr(backbone, "pooler", None) is not None:
            cast("Any", backbone).pooler = None  # unused: news embeddings come from attentive pooling
        self.backbone = backbone

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors, as Hugging Face does."""
        with quiet_transformers():
            self.backbone.save_pretrained(folder)

    @property
    def layers(self) -> nn.ModuleList:
        return _find_layers(self.backbone)[2]

    @property
    def hidden_size(self) -> int:
        return int(self.backbone.config.hidden_size)

    @property
    def word_embedding(self) -> nn.Embedding:
        return cast("nn.Embedding", self.backbone.get_input_embeddings())

    @property
    def heads(self) -> int:
        config = self.backbone.config
        return int(getattr(config, "num_attention_heads", 0) or config.n_heads)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Hidden states (B, L, D) of n + 1 levels, the embedding layer's output first, from `input_ids` (B,
        L) and an `attention_mask` (B, L), 1 at real tokens."""
        mask, config = attention_mask, self.backbone.config
        if config._attn_implementation == "sdpa" and getattr(config, "layer_types", None) is None:
            # (B, 1, L, L). Given a mask (B, L), transformers waits for the device to look for padding in it.
            # Only of (B, L) it can make a mask for each kind of layer.
            mask = mask.bool()[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
        output = self.backbone(input_ids=input_ids, attention_mask=mask, output_hidden_states=True)
        return (*output.hidden_states[:-1], output.last_hidden_state)  # with the norm after the last layer

    def encode(self, input_ids: Tensor, attention_mask: Tensor, *, projections: bool = False) -> States:
        """Hidden states as `forward` returns them and, on request, each layer's queries, keys and values;
        EncoderError if the layers have no separate maps for these."""
        if not projections:
            return States(self(input_ids, attention_mask))
        maps = [_projection_maps(layer) for layer in self.layers]
        captured: dict[nn.Module, Tensor] = {}

        def capture(module: nn.Module, _: Any, output: Tensor) -> None:
            captured[module] = output

        handles = [module.register_forward_hook(capture) for modules in maps for module in modules]
        try:
            hidden = self(input_ids, attention_mask)
        finally:
            for handle in handles:
                handle.remove()
        shape = (*input_ids.shape, self.heads, -1)
        parts = [[captured[one].view(shape).transpose(1, 2) for one in modules] for modules in maps]
        return States(hidden, tuple(Projections(*part) for part in parts))

    def compile_layers(self) -> None:
        """Compile each layer when it first runs, for any size of batch; EncoderError without a C++ compiler.
        Layers of one kind share the compiled code, which whole encoders of different depths would not."""
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise EncoderError(
                f"compile: there is no C++ compiler '{compiler}'; install g++, or leave compile out"
            )
        # On CPUs the compiler's patterns would put back the fused attention that LossModel leaves out.
        options = {"pattern_matcher": False} if self.word_embedding.weight.device.type == "cpu" else None
        for layer in self.layers:
            layer.compile(dynamic=True, options=options)

    def pick_layers(self, numbers: Sequence[int]) -> Encoder:
        """A copy with the embeddings and the layers of these numbers (from 1); students start like this.
        EncoderError where the first layer of this family is built in another way than the one chosen for it.
        """
        backbone = copy.deepcopy(self.backbone)
        parent, name, layers = _find_layers(backbone)
        setattr(parent, name, nn.ModuleList([layers[number - 1] for number in numbers]))
        set_layers(backbone.config, numbers)
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            fresh = type(backbone)(backbone.config)
        parts = ({n for n in model.state_dict() if "pooler" not in n} for model in (fresh, backbone))
        if len(set(map(frozenset, parts))) > 1:
            raise EncoderError(
                f"an encoder of type '{backbone.config.model_type}' cannot begin with layer {numbers[0]}, as "
                "its first layer is built in another way; set student.start first"
            )
        return Encoder(backbone)


def set_layers(config: Any, numbers: Sequence[int]) -> None:
    """Change a configuration to these layers (from 1), whose kinds it may list."""
    if (kinds := getattr(config, "layer_types", None)) is not None:
        config.layer_types = [kinds[number - 1] for number in numbers]
    config.num_hidden_layers = len(numbers)


def write_encoder(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write config.json and model.safetensors of an encoder that transformers does not know."""
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_tensors(weights, folder / WEIGHTS)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({n: value.contiguous() for n, value in on_cpu(tensors).items()}, path, {"format": "pt"})


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, detached. Those of a GPU are copied together, with one wait at the end."""
    copies = {n: value.detach().to("cpu", non_blocking=value.is_cuda) for n, value in tensors.items()}
    if any(value.is_cuda for value in tensors.values()):
        torch.cuda.synchronize()
    return copies


def _find_layers(backbone: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The module list with as many entries as the configuration has layers: parent, attribute, list."""
    config = cast("Any", backbone).config
    depth = int(config.num_hidden_layers)
    for parent in backbone.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return parent, name, child
    raise EncoderError(
        f"an encoder of type '{config.model_type}' shares or hides its layers; each needs a module of its own"
    )


def _projection_maps(layer: nn.Module) -> list[nn.Module]:
    modules = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
    for names in _PROJECTION_NAMES:
        if all(name in modules for name in names):
            return [modules[name] for name in names]
    raise EncoderError(
        "losses on attention need an encoder with separate query, key and value maps, as BERT, RoBERTa, "
        "DistilBERT, MPNet and ELECTRA have"
    )
