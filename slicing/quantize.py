"""Quantised sliced checkpoints in the format of compressed-tensors, for vLLM and Transformers.

Linears of the decoder layers get eight bits and a scale a row, rounded to nearest, and what they
read is quantised a token while it runs; or four bits and a scale a group of inputs, rounded by
GPTQ or to nearest, and what they read stays as it is. Embedding, head and rotations keep their
dtype.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from sliceserve.slicing.calibration import check_vocabulary, pick_windows
from sliceserve.slicing.checkpoint import (
    PROVENANCE,
    CheckpointSummary,
    read_checkpoint_summary,
    read_sliced_config,
    staged_directory,
)
from sliceserve.slicing.config import SlicedConfig
from sliceserve.slicing.corpora import read_corpus
from sliceserve.slicing.devices import checked_device, within_memory
from sliceserve.slicing.errors import UserError
from sliceserve.slicing.gptq import LayerRounder
from sliceserve.slicing.packing import Packer
from sliceserve.slicing.parsing import GROUP_SIZES
from sliceserve.slicing.quantised import (
    SCHEMES,
    Scheme,
    check_unquantised,
    quantised_linears,
)
from sliceserve.slicing.source import Location, copy_tokenizer, load_tokenizer, read_json_object
from sliceserve.slicing.weights import INDEX, ShardReader, write_tensors

TILE = 64  # outputs: a narrower last tile would be padded by Marlin, or refused
ROUNDED = "rounded"  # the directory of what GPTQ has found, until shards are written


@dataclass(frozen=True)
class QuantizeOptions:
    """What to quantise and how; the fields are the options of `sliceserve quantize`.

    Attributes:
        directory: a sliced checkpoint that is not quantised.
        output: directory to make.
        scheme: a name of `SCHEMES`.
        group_size: inputs that share a scale, one of `GROUP_SIZES`; None takes the scheme's own.
        rounding: "nearest" or "gptq"; None takes gptq for a scheme with groups.
        calibration: the text for GPTQ (see `corpora.read_corpus`).
        samples: its windows.
        sequence_length: tokens in a window.
        seed: chooses the windows.
        device: where GPTQ runs.

    """

    directory: Path
    output: Path
    scheme: str
    group_size: int | None = None
    rounding: str | None = None
    calibration: str = "mixture"
    samples: int = 64
    sequence_length: int = 2048
    seed: int = 0
    device: str = "cpu"


def run_quantize(options: QuantizeOptions, show_progress: bool = True) -> CheckpointSummary:
    """Quantise a sliced checkpoint; `options.output` appears when it is complete.

    Raises:
        UserError: anything the user gave that cannot be used: no such checkpoint, one that is
            quantised, linears that groups do not divide; or compressed-tensors is missing.

    """
    scheme = choose_scheme(options)
    directory = options.directory
    summary = read_checkpoint_summary(directory)
    config = read_sliced_config(directory)
    check_unquantised(directory, config, "quantize")
    linears = quantised_linears(config)
    check_groups(linears, scheme)
    packer = Packer(scheme)
    reader = ShardReader(directory)
    rounding = choose_rounding(options, scheme)
    record = {"scheme": scheme.name, "group_size": scheme.group_size, "rounding": rounding}
    with staged_directory(options.output, summary.bytes) as staging:
        rounded: dict[str, Path] = {}
        if rounding == "gptq":
            names = ("calibration", "samples", "sequence_length", "seed")
            record |= {name: getattr(options, name) for name in names}
            rounded = _round_layers(options, config, packer, staging / ROUNDED, show_progress)
        weight_map: dict[str, str] = {}
        total = 0
        for file in tqdm(reader.files, desc="quantising", unit="shard", disable=not show_progress):
            tensors: dict[str, Tensor] = {}
            for name, tensor in load_file(file).items():
                path = name.removesuffix(".weight")
                if name not in linears:
                    tensors[name] = tensor
                elif path in rounded:
                    tensors |= _read_linear(rounded[path], path)
                else:
                    packed = packer.pack(tensor, packer.scales(tensor))
                    tensors |= {f"{path}.{leaf}": x for leaf, x in packed.items()}
            write_tensors(staging / file.name, tensors)
            weight_map |= dict.fromkeys(tensors, file.name)
            total += sum(tensor.nbytes for tensor in tensors.values())
        shutil.rmtree(staging / ROUNDED, ignore_errors=True)
        if (directory / INDEX).exists():
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (staging / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        fields = {"quantization_config": packer.fields(config)}
        written = read_json_object(directory / "config.json") | fields
        (staging / "config.json").write_text(json.dumps(written, indent=2) + "\n")
        copy_tokenizer(Location(directory, None), staging)
        if (generation := directory / "generation_config.json").is_file():
            shutil.copyfile(generation, staging / generation.name)
        provenance = summary.provenance | {"quantization": record}
        (staging / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")
        read_checkpoint_summary(staging)
    return read_checkpoint_summary(options.output)


def choose_scheme(options: QuantizeOptions) -> Scheme:
    """Return the scheme with the group size asked for.

    Raises:
        UserError: the scheme has a scale a row.

    """
    scheme = SCHEMES[options.scheme]
    if options.group_size is None:
        return scheme
    if scheme.group_size is None:
        raise UserError(
            f"--group-size {options.group_size} is for w4a16: --scheme {scheme.name} has no groups"
        )
    return replace(scheme, group_size=options.group_size)


def choose_rounding(options: QuantizeOptions, scheme: Scheme) -> str:
    """Return how to round: as asked for, or what the scheme needs.

    Raises:
        UserError: GPTQ for a scheme of eight bits, which are rounded to nearest.

    """
    if options.rounding == "gptq" and scheme.group_size is None:
        raise UserError(f"--rounding gptq is for w4a16: --scheme {scheme.name} has eight bits")
    return options.rounding or ("nearest" if scheme.group_size is None else "gptq")


def check_groups(shapes: Mapping[str, tuple[int, int]], scheme: Scheme) -> None:
    """Check that groups of inputs and tiles of outputs divide the linears.

    Args:
        shapes: of the weights, [outputs, inputs], by name.
        scheme: to quantise by.

    Raises:
        UserError: they do not; names the first linear and what would do.

    """
    size = scheme.group_size
    if size is None:
        return
    for name, (outputs, inputs) in shapes.items():
        path = name.removesuffix(".weight")
        if inputs % size:
            fit = [
                str(other)
                for other in GROUP_SIZES
                if all(inputs % other == 0 for _, inputs in shapes.values())
            ]
            advice = f"--group-size {fit[0]} does" if fit else f"slice with --round-to {size}"
            raise UserError(
                f"--group-size {size} does not divide the {inputs} inputs of {path}: {advice}"
            )
        if outputs % TILE:
            raise UserError(
                f"--scheme {scheme.name} needs outputs in multiples of {TILE}, and {path} has "
                f"{outputs}: slice with --round-to {TILE}"
            )


def _round_layers(
    options: QuantizeOptions,
    config: SlicedConfig,
    packer: Packer,
    parts: Path,
    show_progress: bool,
) -> dict[str, Path]:
    """Round all linears by GPTQ into files of `parts`, one a layer; return where each is."""
    device = checked_device(options.device)
    if options.sequence_length > config.max_position_embeddings:
        raise UserError(
            f"--sequence-length {options.sequence_length} is more than the "
            f"{config.max_position_embeddings} positions of DIR {str(options.directory)!r}"
        )
    windows = pick_windows(
        read_corpus(options.calibration, "--calibration"),
        load_tokenizer(Location(options.directory, None)),
        options.samples,
        options.sequence_length,
        options.seed,
        "--calibration",
    )
    check_vocabulary(windows, config.vocab_size)
    parts.mkdir()
    found: dict[str, Path] = {}
    with within_memory(device):
        rounder = LayerRounder(options.directory, config, packer, device)
        for number, tensors in enumerate(rounder.run(windows, parts / "spilled", show_progress)):
            file = parts / f"layer-{number:05d}.safetensors"
            write_tensors(file, tensors)
            found |= dict.fromkeys((name.rpartition(".")[0] for name in tensors), file)
    return found


def _read_linear(file: Path, path: str) -> dict[str, Tensor]:
    with safe_open(file, "pt") as part:
        names = [name for name in part.keys() if name.startswith(f"{path}.")]  # noqa: SIM118 - no mapping
        return {name: part.get_tensor(name) for name in names}
