"""Run the kernels in Triton's interpreter: INPUTS OUTPUTS, files of torch.save.

A process of its own, because Triton must see TRITON_INTERPRET when it is imported first.
"""

import sys

import torch

from sliceserve.kernels import gated, rounded

if __name__ == "__main__":
    source, target = sys.argv[1:]
    cases = torch.load(source)
    kernels = {"gated": gated.launch, "rounded": rounded.launch, "whole": rounded.launch}
    torch.save({name: [kernels[name](*case) for case in cases[name]] for name in kernels}, target)
