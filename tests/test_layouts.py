"""Random sliced models spread over two processes in vLLM, against Transformers."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_sliced, tiny_config
from rounding import FP8, rounded, scale_of, widened
from safetensors.torch import load_file
from test_checkpoint import shard
from test_vllm import EAGER, PROMPTS, generate_each, greedy
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import LlamaConfig

from sliceserve.slicing.modeling import SlicedLayer
from sliceserve.slicing.quantize import QuantizeOptions, run_quantize

GROUP_SIZE = 64
# Of low-rank rotations, what each of two ranks holds by rank: steps of 16 directions.
SHARES = {8: [8, 0], 24: [16, 8], 40: [32, 8]}
RANKS = [24, 40, 8, 24, 24, 8]
DTYPES = {"int8": torch.int8, "fp8": FP8}


def save_quantised(work: Path, scheme: str, dense: LlamaConfig, width: int) -> Path:
    sliced = save_sliced(work / f"{scheme}-sliced", dense, [width] * 7, RANKS)
    size = GROUP_SIZE if scheme == "w4a16" else None
    windows = {"samples": 2, "sequence_length": 32} if size else {}
    options = QuantizeOptions(sliced, work / scheme, scheme, size, **windows)
    run_quantize(options, show_progress=False)
    return work / scheme


def share_fp8(scales: Tensor, written: Tensor, _: Tensor, up: Tensor) -> None:
    """Round a rank's share of a sublayer's writer and of a rotation: scales grow by powers of 2."""
    grown = scales * 2 ** (scale_of(up) / scales).log2().ceil().clamp(min=0)
    for columns in (written, up):
        columns.copy_(rounded(columns, grown))


def share_int8(scales: Tensor, written: Tensor, down: Tensor, up: Tensor) -> None:
    """The same with each direction balanced, after rows that would decide for all have grown."""
    ratios = scale_of(up, torch.int8) / scales
    grown = scales * (ratios / (4 * ratios.median())).clamp(min=1)
    written.copy_(rounded(written, grown, torch.int8))
    balance = (up / grown).abs().amax(0) / 127
    down.mul_(balance[:, None])
    up.copy_(rounded(up / balance, grown, torch.int8))


def round_in_shares(model: nn.Module, directory: Path, scheme: str) -> None:
    """Round to eight bits as two ranks do, each its columns of what the stream is written with."""
    tensors, dtype = load_file(shard(directory)), DTYPES[scheme]
    share = share_fp8 if dtype == FP8 else share_int8
    for path, layer in model.named_modules():
        if not isinstance(layer, SlicedLayer):
            continue
        for sublayer, rotation in zip(
            layer.architecture.sublayers, layer.residual_rotation, strict=True
        ):
            (write,) = sublayer.writes
            linears: Any = layer.get_submodule(write), rotation.down, rotation.up
            writer, down, up = linears
            sizes = SHARES[down.out_features]
            shares = zip(
                writer.weight.data.chunk(2, 1),
                down.weight.data.split(sizes),
                up.weight.data.split(sizes, 1),
                strict=True,
            )
            for written, rows, columns in shares:
                if columns.numel():
                    share(tensors[f"{path}.{write}.weight_scale"], written, rows, columns)
            down.weight.data = rounded(down.weight.data, scale_of(down.weight.data, dtype), dtype)
            for linear in (down, *(layer.get_submodule(name) for name in sublayer.reads)):
                linear.register_forward_pre_hook(
                    lambda _, x: rounded(x[0], scale_of(x[0], dtype), dtype)
                )
            round_shared(layer.get_submodule(sublayer.norm), writer, down, up, dtype)


def round_shared(norm: nn.Module, writer: Any, down: Any, up: Any, dtype: torch.dtype) -> None:
    """Round what a rank multiplies, of the branch and of the rotation, by one scale a token."""
    sizes, scales = SHARES[down.out_features], []

    def rounded_shares(shares: tuple[Tensor, ...]) -> Tensor:
        both = zip(shares, scales, strict=True)
        return torch.cat([rounded(share, scale, dtype) for share, scale in both], -1)

    def see_stream(_: nn.Module, inputs: tuple[Tensor]) -> None:
        # A share may be empty.
        shares = down(inputs[0]).split(sizes, -1)
        scales[:] = [scale_of(pad(share, (0, 1)), dtype) for share in shares]

    def round_branch(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        shares = inputs[0].chunk(2, -1)
        both = zip(shares, scales, strict=True)
        scales[:] = [scale_of(share, dtype).maximum(scale) for share, scale in both]
        return rounded_shares(shares)

    norm.register_forward_pre_hook(see_stream)
    writer.register_forward_pre_hook(round_branch)
    up.register_forward_pre_hook(lambda _, x: rounded_shares(x[0].split(sizes, -1)))


def round_four_bits(model: nn.Module) -> None:
    """Round rotations to four bits as two ranks do: no group has columns of both."""
    for layer in (module for module in model.modules() if isinstance(module, SlicedLayer)):
        for rotation in layer.residual_rotation:
            down, up = (linear.weight.data for linear in rotation.children())
            for columns in (*down.split(GROUP_SIZE, 1), *up.split(SHARES[len(down)], 1)):
                if columns.numel():
                    held = columns.half().float()
                    scale = (held.abs().amax(1, keepdim=True) / 7.5).half().float()
                    columns.copy_((held / scale).round().clamp(-8, 7) * scale)


def test_two_ranks_share_rotations_groups_and_scales_and_add_biases_once(tmp_path: Path) -> None:
    """Of most rotations both ranks have a part, of some only the first.

    Prompts are short: of more values one is sooner in the middle of two that eight bits have, and
    rounded otherwise on another CPU.
    """
    wider: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 256}
    biased = tiny_config(**wider, attention_bias=True, mlp_bias=True)
    models = {
        "int8": save_quantised(tmp_path, "int8", tiny_config(), 64),
        "fp8": save_quantised(tmp_path, "fp8", tiny_config(), 64),
        "w4a16": save_quantised(tmp_path, "w4a16", biased, 128),
    }
    dtypes = [{"dtype": "float32"}, {"dtype": "float32"}, {"dtype": "float16"}]
    options = EAGER | {"tensor_parallel_size": 2}
    prompts = [*PROMPTS[:2], [17], [250, 3], [33, 44, 55, 66]]
    results = generate_each(list(models.values()), prompts, 1, options, dtypes)
    tolerances = {"int8": 2e-3, "fp8": 2e-3, "w4a16": 2e-2}
    for (scheme, directory), served in zip(models.items(), results, strict=True):
        wide, prepare = directory, round_four_bits
        if scheme in DTYPES:
            wide = widened(directory, tmp_path / f"{scheme}-wide")
            prepare = partial(round_in_shares, directory=directory, scheme=scheme)
        for ours, theirs in zip(served, greedy(wide, prompts, 1, prepare), strict=True):
            assert ours["tokens"] == theirs["tokens"], scheme
            assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=tolerances[scheme])
