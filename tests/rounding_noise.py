"""What bfloat16 makes of logprobs in int8, beside what an adapter that is left out does.

    PYTHONPATH=benchmarks python tests/rounding_noise.py WORK_DIR

`gpu_agreement.py` allows for the former and is to see the latter. Both are Transformers, on a CPU:
a sliced Llama in int8 with a LoRA adapter of all linears, what each module returns rounded to
bfloat16, beside the same in float32, of which the adapters of some linears are left out. Printed
are the smallest and the largest of 32 means, and of 32 largest differences, each of 96 tokens that
the first had chosen.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from adapters import add_adapter, make_adapter
from gpu_agreement import FORMS, dense_configs, make_dense
from rounding import round_joined_int8, widened
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sliceserve.slicing.job import SliceOptions, run_slice
from sliceserve.slicing.modeling import SlicedLayer
from sliceserve.slicing.quantize import QuantizeOptions, run_quantize

LEFT_OUT = {
    "nothing": (),
    "o_proj of layer 2": ("layers.2.self_attn.o_proj",),
    "v_proj of layer 3": ("layers.3.self_attn.v_proj",),
    "down_proj of layer 5": ("layers.5.mlp.down_proj",),
}
COUNT, TOKENS, LENGTH = 24, 96, 128


def make_models(work: Path) -> tuple[Path, Path]:
    """Make a checkpoint in int8 and an adapter of it."""
    dense = make_dense(work / "llama", dense_configs()["llama"])
    calibration = {"sequence_length": 512, "device": "cpu"}
    sliced, stored = work / "sliced", work / "int8"
    run_slice(
        SliceOptions(
            str(dense), sliced, samples=8, round_to=128, **calibration, **FORMS["low-rank"]
        )
    )
    run_quantize(QuantizeOptions(sliced, stored, "int8"), show_progress=False)
    return stored, make_adapter(sliced, 0.05)[0]


def load(wide: Path, stored: Path, adapter: Path) -> Any:
    """Load the model in float32, rounding as vLLM does."""
    model: Any = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32)
    add_adapter(model, adapter)
    round_joined_int8(model, stored)
    return model.eval()


def narrow(model: nn.Module) -> None:
    """Have modules of the layers return what bfloat16 has."""

    def round_output(_: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output.bfloat16().float()
        return tuple(one.bfloat16().float() if isinstance(one, Tensor) else one for one in output)

    for layer in (module for module in model.modules() if isinstance(module, SlicedLayer)):
        for module in layer.modules():
            module.register_forward_hook(round_output)


def leave_out(adapter: Path, output: Path, paths: tuple[str, ...]) -> Path:
    """Write an adapter without what it has for some linears."""
    output.mkdir(parents=True, exist_ok=True)
    factors = load_file(adapter / "adapter_model.safetensors")
    kept = {name: one for name, one in factors.items() if not any(path in name for path in paths)}
    save_file(kept, output / "adapter_model.safetensors")
    return output


@torch.no_grad()
def logprobs(model: Any, prompts: Tensor) -> Tensor:
    """Return the logprobs after each token of each prompt."""
    scores: Tensor = torch.cat([model(input_ids=one[None]).logits for one in prompts])
    return scores.log_softmax(-1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("work", type=Path, metavar="WORK_DIR")
    work = parser.parse_args().work
    stored, adapter = make_models(work)
    wide = widened(stored, work / "wide")
    prompts = torch.randint(250, (COUNT, LENGTH), generator=torch.Generator().manual_seed(1))
    model = load(wide, stored, adapter)
    narrow(model)
    found = logprobs(model, prompts)
    chosen = found.argmax(-1, keepdim=True)
    print("| left out of float32 | mean | largest |\n| --- | ---: | ---: |")
    for name, paths in LEFT_OUT.items():
        reference = load(wide, stored, leave_out(adapter, work / "fewer" / name, paths))
        far = (found - logprobs(reference, prompts)).gather(-1, chosen).abs().view(-1, TOKENS)
        cells = (f"{one.min():.3f} to {one.max():.3f}" for one in (far.mean(1), far.amax(1)))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
