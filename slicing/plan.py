"""How many GPUs a model needs, dense and sliced, from its config alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from sliceserve.slicing.architectures import Architecture, find_architecture
from sliceserve.slicing.checkpoint import read_sliced_config
from sliceserve.slicing.config import MODEL_TYPE
from sliceserve.slicing.dense import DenseOutline, outline_dense_model
from sliceserve.slicing.errors import UserError, reading
from sliceserve.slicing.footprint import Footprint, Load, Shapes, footprint
from sliceserve.slicing.job import SliceOptions
from sliceserve.slicing.modeling import expected_shapes
from sliceserve.slicing.placement import stages, tensor_parallel_bytes, tensor_parallel_gpus
from sliceserve.slicing.quantised import SCHEMES, Scheme, quantised_scheme
from sliceserve.slicing.shape import FRACTION, choose_shape
from sliceserve.slicing.source import CONFIG_ALONE, locate, read_json_object

ROTATIONS = ("dense", "low-rank", "shared")
SHOWN = ("none", "fp8")  # quantizations, unless told


@dataclass(frozen=True)
class PlanOptions:
    """What to plan for; the fields are the options of `sliceserve plan`.

    Attributes:
        model: a dense model or a sliced checkpoint; its config.json is enough.
        revision: of a model on the hub; None takes its main branch.
        gpu_memory: bytes of one GPU.
        gpu_memory_utilization: the share of them for weights, cache and activations, in (0, 1].
        fraction: those of hidden_size to delete; None takes `shape.FRACTION`.
        rotation: the forms to show; None takes all.
        rank: of low-rank rotations; None as for `sliceserve slice`.
        round_to: the width kept is a multiple of this; None as for `sliceserve slice`.
        quantization: "none" or names of `SCHEMES`; None takes "none" and "fp8", or that of a
            quantised checkpoint.
        dtype: of weights, cache and activations; None takes the config's, and bfloat16 if it has
            none.
        context: tokens of one sequence; None takes all positions of the model.
        concurrency: sequences at once.
        batched_tokens: at most in one step of the engine.

    """

    model: str
    gpu_memory: int
    gpu_memory_utilization: float = 0.92
    fraction: list[float] | None = None
    rotation: list[str] | None = None
    rank: int | None = None
    round_to: int | None = None
    quantization: list[str] | None = None
    dtype: str | None = None
    context: int | None = None
    concurrency: int = 1
    batched_tokens: int = 2048
    revision: str | None = None


@dataclass(frozen=True)
class Form:
    """One way to serve the model, and what that takes.

    Attributes:
        name: "dense", "sliced" for a checkpoint that is, or the form it would be sliced to.
        fraction: of hidden_size deleted; None if not planned here.
        rotation: the form of the rotations; None likewise.
        width: columns of the residual stream at the first place.
        rank: of the rotations; None for whole matrices, or where there are none.
        quantization: "none" or a name of `SCHEMES`.
        group_size: inputs that share a scale; None where that is a row, or nothing is quantised.
        parameters: rotations and head included, a tied table once.
        ratio: parameters over those of the dense model.
        embedding_bytes: of token and position tables.
        layers_bytes: of all decoder layers, without rotations.
        rotations_bytes: of the residual rotations.
        head_bytes: of what comes after the last layer; nothing of a tied table.
        cache_bytes: keys and values of all layers.
        activation_bytes: kept free on one GPU.
        pipeline_gpus: in a pipeline of whole layers; None if one layer does not fit.
        pipeline_layers: on each of them.
        tensor_parallel_gpus: the smallest tensor-parallel size that fits; None if none does.
        tensor_parallel_bytes: on each of those, cache and activations included.

    """

    name: str
    fraction: float | None
    rotation: str | None
    width: int
    rank: int | None
    quantization: str
    group_size: int | None
    parameters: int
    ratio: float
    embedding_bytes: int
    layers_bytes: int
    rotations_bytes: int
    head_bytes: int
    cache_bytes: int
    activation_bytes: int
    pipeline_gpus: int | None
    pipeline_layers: list[int] | None
    tensor_parallel_gpus: int | None
    tensor_parallel_bytes: int | None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.embedding_bytes + self.layers_bytes + self.rotations_bytes + self.head_bytes


@dataclass(frozen=True)
class Plan:
    """What was planned, for what, and how many GPUs each form takes."""

    model: str
    architecture: str
    dtype: str
    gpu_bytes: int
    gpu_memory_utilization: float
    load: Load
    forms: list[Form]

    @property
    def usable_bytes(self) -> int:
        """Bytes of one GPU that weights, cache and activations may take."""
        return int(self.gpu_bytes * self.gpu_memory_utilization)

    @property
    def batched_tokens(self) -> int:
        """Tokens of the largest step."""
        return min(self.load.batched_tokens, self.load.context * self.load.concurrency)


@dataclass(frozen=True)
class _Candidate:
    """A form before its GPUs are counted; the fields are those of `Form`, shapes and config."""

    name: str
    fraction: float | None
    rotation: str | None
    rank: int | None
    ratio: float
    width: int
    shapes: Shapes
    config: Any


def make_plan(options: PlanOptions) -> Plan:
    """Count the GPUs of a model's forms; reads its config and nothing else.

    Raises:
        UserError: no such model, one that is not supported, or options that do not fit it.
        MachineError: the hub did not answer.

    """
    location = locate(options.model, CONFIG_ALONE, options.revision)
    directory = location.directory
    path = directory / "config.json"
    sliced = (
        location.gguf_file is None
        and path.is_file()
        and read_json_object(path).get("model_type") == MODEL_TYPE
    )
    if sliced:
        config, architecture, candidates = _checkpoint(options, directory)
    else:
        outline = outline_dense_model(location)
        config, architecture = outline.config, outline.architecture
        candidates = list(_candidates(options, outline))
    named = options.dtype or str(config.dtype or "bfloat16").removeprefix("torch.")
    dtype: torch.dtype = getattr(torch, named)
    load = Load(_context(options, config), options.concurrency, options.batched_tokens)
    usable = int(options.gpu_memory * options.gpu_memory_utilization)
    forms = []
    own = quantised_scheme(config) if sliced else None
    if own and options.quantization:
        asked = " ".join(options.quantization)
        raise UserError(f"--quantization {asked}: MODEL {str(directory)!r} is quantised already")
    # "none" is no scheme.
    schemes = [own] if own else [SCHEMES.get(name) for name in options.quantization or SHOWN]
    for scheme, candidate in product(schemes, candidates):
        memory = footprint(candidate.shapes, candidate.config, architecture, dtype, scheme, load)
        forms.append(_form(candidate, scheme, memory, usable))
    return Plan(
        model=options.model,
        architecture=architecture.causal_lm,
        dtype=named,
        gpu_bytes=options.gpu_memory,
        gpu_memory_utilization=options.gpu_memory_utilization,
        load=load,
        forms=forms,
    )


def _context(options: PlanOptions, config: Any) -> int:
    positions = int(config.max_position_embeddings)
    if options.context is not None and options.context > positions:
        raise UserError(
            f"--context {options.context} is more than the {positions} positions of "
            f"MODEL {options.model!r}"
        )
    return options.context or positions


def _checkpoint(
    options: PlanOptions, directory: Path
) -> tuple[Any, Architecture, list[_Candidate]]:
    for name in ("fraction", "rotation", "rank", "round_to"):
        if (value := getattr(options, name)) is not None:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {value}: MODEL {str(directory)!r} is sliced already")
    config = read_sliced_config(directory)
    slicing = config.description
    with reading(f"config of MODEL {str(directory)!r}"):
        shapes = expected_shapes(config)
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    candidate = _Candidate(
        name="sliced",
        fraction=None,
        rotation=None,
        rank=None,
        ratio=parameters / slicing.dense_parameters,
        width=slicing.widths[0],
        shapes=shapes,
        config=config,
    )
    return config, find_architecture(slicing.architecture), [candidate]


def _candidates(options: PlanOptions, model: DenseOutline) -> Iterator[_Candidate]:
    rotations = options.rotation or ROTATIONS
    if options.rank is not None and "low-rank" not in rotations:
        raise UserError(f"--rank {options.rank} needs --rotation low-rank")
    hidden_size = int(model.config.hidden_size)
    yield _Candidate("dense", None, None, None, 1.0, hidden_size, model.shapes(), model.config)
    given: dict[str, Any] = {} if options.round_to is None else {"round_to": options.round_to}
    for fraction, rotation in product(options.fraction or [FRACTION], rotations):
        rank = options.rank if rotation == "low-rank" else None
        chosen = SliceOptions(
            options.model, Path(), fraction=fraction, rotation=rotation, rank=rank, **given
        )
        shape = choose_shape(chosen, model, torch.bfloat16)
        config = shape.config([shape.rank] * (len(shape.widths) - 1))
        yield _Candidate(
            name=f"{fraction:.4g} {rotation}",
            fraction=fraction,
            rotation=rotation,
            rank=shape.rank,
            ratio=shape.parameters / model.parameters,
            width=shape.widths[0],
            shapes=expected_shapes(config),
            config=config,
        )


def _form(candidate: _Candidate, scheme: Scheme | None, memory: Footprint, usable: int) -> Form:
    layers = stages(memory, usable)
    group_size = scheme.group_size if scheme else None
    ranks = tensor_parallel_gpus(memory, candidate.config, usable, group_size)
    return Form(
        name=candidate.name,
        fraction=candidate.fraction,
        rotation=candidate.rotation,
        width=candidate.width,
        rank=candidate.rank,
        quantization=scheme.name if scheme else "none",
        group_size=group_size,
        parameters=memory.parameters,
        ratio=candidate.ratio,
        embedding_bytes=memory.embedding.bytes,
        layers_bytes=sum(layer.bytes for layer in memory.layers),
        rotations_bytes=sum(rotation.bytes for rotation in memory.rotations),
        head_bytes=memory.head.bytes,
        cache_bytes=memory.cache.bytes * len(memory.layers),
        activation_bytes=memory.activations.bytes,
        pipeline_gpus=len(layers) if layers else None,
        pipeline_layers=layers,
        tensor_parallel_gpus=ranks,
        tensor_parallel_bytes=tensor_parallel_bytes(memory, ranks) if ranks else None,
    )
