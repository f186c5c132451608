"""What a model takes of a GPU's memory when it is served: weights by part, KV cache, activations.

Everything follows from the names and shapes of its tensors, dense or sliced, and from the config.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from sliceserve.slicing.architectures import Architecture
from sliceserve.slicing.config import head_dim
from sliceserve.slicing.modeling import HEAD_MAP, ROTATION
from sliceserve.slicing.quantised import Scheme

LOGITS_COPIES = 2  # in float32, while a token is drawn
STREAM_COPIES = 3  # the residual, its norm, and what is added to it

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Load:
    """What is asked of the server at once.

    Attributes:
        context: tokens of one sequence, prompt and answer.
        concurrency: sequences at once.
        batched_tokens: at most in one step of the engine.

    """

    context: int
    concurrency: int
    batched_tokens: int


@dataclass(frozen=True)
class Part:
    """Bytes of a part of the model: those that tensor parallelism splits, and the others."""

    split: int = 0
    whole: int = 0

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.split + self.whole

    def __add__(self, other: "Part") -> "Part":
        return Part(self.split + other.split, self.whole + other.whole)

    def share(self, ranks: int) -> int:
        """Return the bytes on one of so many tensor-parallel ranks."""
        return -(-self.split // ranks) + self.whole


@dataclass(frozen=True)
class Footprint:
    """The memory of a model that is served, in bytes.

    Attributes:
        parameters: numbers stored, rotations included and a tied table counted once.
        embedding: the tables of tokens and positions.
        layers: one entry a decoder layer, without its rotations.
        rotations: one entry a decoder layer.
        head: final norm, head and the map before a tied head; nothing of a tied table.
        tied: the table, if the head is tied to it: a last pipeline stage holds it again.
        cache: keys and values of one layer.
        activations: the widest layer's at the largest step, and the logits.

    """

    parameters: int
    embedding: Part
    layers: list[Part]
    rotations: list[Part]
    head: Part
    tied: Part
    cache: Part
    activations: Part


def footprint(
    shapes: Shapes,
    config: Any,
    architecture: Architecture,
    dtype: torch.dtype,
    scheme: Scheme | None,
    load: Load,
) -> Footprint:
    """Add up the memory of a dense or sliced model.

    Args:
        shapes: of all its tensors, a tied table once.
        config: of the model, dense or sliced.
        architecture: the description of the dense model.
        dtype: of weights, cache and activations.
        scheme: of the layers' linears; None leaves them in `dtype`. Embedding and head are never
            quantised; rotations are counted as they are stored, also where they join linears.
        load: what is asked of the server.

    """
    parts = _Parts(architecture, dtype, scheme)
    count = int(config.num_hidden_layers)
    embedding, head = Part(), Part()
    layers, rotations = [Part()] * count, [Part()] * count
    for name, shape in shapes.items():
        part = parts.of(name, shape)
        if name.startswith(f"{architecture.layers}."):
            index = int(name.removeprefix(f"{architecture.layers}.").split(".")[0])
            group = rotations if f".{ROTATION}." in name else layers
            group[index] += part
        elif name.startswith(tuple(f"{path}." for path in architecture.tables)):
            embedding += part
        else:
            head += part
    table = f"{architecture.tokens}.weight"
    tied = parts.of(table, shapes[table]) if config.tie_word_embeddings else Part()
    return Footprint(
        parameters=sum(map(prod, shapes.values())),
        embedding=embedding,
        layers=layers,
        rotations=rotations,
        head=head,
        tied=tied,
        cache=Part(split=cache_bytes(config, dtype, load)),
        activations=_activations(shapes, config, architecture, dtype, load),
    )


def cache_bytes(config: Any, dtype: torch.dtype, load: Load) -> int:
    """Return the bytes of one layer's keys and values, for all sequences at full length."""
    token = 2 * key_value_heads(config) * head_dim(config) * dtype.itemsize
    return token * load.context * load.concurrency


def key_value_heads(config: Any) -> int:
    """Return the number of key and value heads; configs without the field have one a head."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


class _Parts:
    """Says of a tensor how many bytes it takes, and whether tensor parallelism splits it."""

    def __init__(
        self, architecture: Architecture, dtype: torch.dtype, scheme: Scheme | None
    ) -> None:
        self.architecture = architecture
        self.dtype = dtype
        self.scheme = scheme

    def of(self, name: str, shape: tuple[int, ...]) -> Part:
        rotation = f".{ROTATION}." in name
        positions = self.architecture.positions is not None and name.startswith(
            f"{self.architecture.positions}."
        )
        if len(shape) < 2 or positions or name.startswith(f"{HEAD_MAP}."):
            return Part(whole=prod(shape) * self.dtype.itemsize)
        if rotation and self.scheme:
            # Beside quantised linears every rank keeps them whole; those that join count so too.
            return Part(whole=prod(shape) * self.dtype.itemsize)
        if self.scheme and name.startswith(f"{self.architecture.layers}."):
            return Part(split=self.scheme.weight_bytes(shape, self.dtype))
        return Part(split=prod(shape) * self.dtype.itemsize)


def _activations(
    shapes: Shapes, config: Any, architecture: Architecture, dtype: torch.dtype, load: Load
) -> Part:
    """Estimate what one step holds beside weights and cache.

    The stream is whole on every tensor-parallel rank; what a sublayer's linears read and write
    between norm and stream is split.
    """
    tokens = min(load.batched_tokens, load.context * load.concurrency)
    inner = 0
    for sublayer in architecture.sublayers:
        reads = [f"{architecture.layers}.0.{path}.weight" for path in sublayer.reads]
        writes = [f"{architecture.layers}.0.{path}.weight" for path in sublayer.writes]
        # Of [out, in]: what the readers give, and what the writers take.
        inner = max(inner, sum(shapes[n][0] for n in reads) + sum(shapes[n][1] for n in writes))
    logits = LOGITS_COPIES * 4 * load.concurrency * int(config.vocab_size)
    stream = STREAM_COPIES * tokens * int(config.hidden_size) * dtype.itemsize
    return Part(split=tokens * inner * dtype.itemsize, whole=stream + logits)
