"""Which widths keep a GPU's matrix products fast: one decoder layer's linears, width by width.

    python benchmarks/widths.py llama-2-7b --around 3072

For each width the time of the products that read and write the residual stream, in bfloat16, as a
CUDA graph, at several numbers of tokens, per column and against the first width of the table.
"""

import argparse
from typing import Any

import torch
from cuda_graph import seconds as graph_seconds
from shapes import GATED, dense_config
from torch import Tensor
from torch.nn.functional import linear

REPLAYS = 20


def seconds(width: int, tokens: int, config: Any) -> float:
    """Return the seconds of one layer's linears, the best of some rounds."""
    hidden, middle = config.hidden_size, config.intermediate_size
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    shapes = [(hidden + 2 * keys, width), (width, hidden), (2 * middle, width), (width, middle)]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda") / 64

    weights = [random(*shape) for shape in shapes]
    inputs = [random(tokens, shape[1]) for shape in shapes]

    def products() -> None:
        for x, weight in zip(inputs, weights, strict=True):
            linear(x, weight)

    return graph_seconds(products, calls=1, replays=REPLAYS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", choices=GATED)
    parser.add_argument("--around", type=int, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 512, 8192])
    options = parser.parse_args()
    config = dense_config(options.shape)
    first = options.around
    offsets = [0, 8, 16, 24, 32, 40, 48, 64, 72, 96, 128, 136, 160, 192, 200, 256]
    print(f"| width | multiple of | {' | '.join(f'{count} tokens' for count in options.tokens)} |")
    print(f"| ---: | ---: | {' | '.join('---:' for _ in options.tokens)} |")
    bases: list[float] = []
    for width in (first + offset for offset in offsets):
        times = [seconds(width, count, config) / width for count in options.tokens]
        bases = bases or times
        cells = " | ".join(f"{time / base:.3f}" for time, base in zip(times, bases, strict=True))
        print(f"| {width} | {width & -width} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
