"""Run the kernels in Triton's interpreter: INPUTS OUTPUTS, files of torch.save.

A process of its own, because Triton must see TRITON_INTERPRET when it is imported first.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from sliceserve.kernels import gated, placed, rounded


def place(*arguments: Any) -> tuple[Tensor, ...]:
    """What the kernel has written."""
    placed.launch(*arguments)
    *_, caches, queries, joined, _, _ = arguments
    return *caches, queries, joined


if __name__ == "__main__":
    source, target = sys.argv[1:]
    cases = torch.load(source)
    kernels = {
        "gated": gated.launch,
        "rounded": rounded.launch,
        "whole": rounded.launch,
        "placed": place,
    }
    torch.save({name: [kernels[name](*case) for case in cases[name]] for name in kernels}, target)
