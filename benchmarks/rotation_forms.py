"""The forms in which a decoder layer can run its rotations, as products on one GPU.

    python benchmarks/rotation_forms.py llama-2-7b llama-2-70b

One decoder layer of a shape in bfloat16, a quarter of the width deleted, without attention itself:
what attention writes is given, so that the products, norms, the activation and the rotations
remain. Each form is compiled by torch.compile, captured as a CUDA graph and timed in turn with the
others. Microseconds a layer, and their ratio to the dense layer's of full width.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from cuda_graph import seconds_in_turn
from shapes import GATED, dense_config
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from sliceserve.kernels.accumulate import accumulate
from sliceserve.kernels.gated import gated
from sliceserve.slicing.rotations import default_rank
from sliceserve.slicing.shape import sliced_width

EPS = 1e-5
CALLS, REPLAYS = 4, 5


@dataclass(frozen=True)
class Sublayer:
    """The matrices of half a layer, [out, in], apart and joined.

    Attributes:
        read: what reads the normed stream.
        write: what writes to it.
        turn: a whole rotation S.
        down: A of a low-rank rotation S = I + A·B.
        up: B.
        read_down: [read ; down].
        write_up: [write ‖ up].
        write_turn: [write ‖ turn].

    """

    read: Tensor
    write: Tensor
    turn: Tensor
    down: Tensor
    up: Tensor
    read_down: Tensor
    write_up: Tensor
    write_turn: Tensor

    @classmethod
    def draw(cls, width: int, reads: int, branch: int, rank: int) -> "Sublayer":
        """Draw a sublayer of a stream of some width."""

        def random(out: int, size: int) -> Tensor:
            noise = torch.randn(out, size, dtype=torch.bfloat16, device="cuda")
            return noise * (size**-0.5)

        read, write, turn = random(reads, width), random(width, branch), random(width, width)
        # So little is turned that a stream to which all is added where it lies does not overflow.
        down, up = random(rank, width), random(width, rank) / 64
        joined = torch.cat([read, down]), torch.cat([write, up], 1), torch.cat([write, turn], 1)
        return cls(read, write, turn, down, up, *joined)


Form = Callable[[Tensor, Sublayer, Callable[[Tensor], Tensor]], tuple[Tensor, Tensor]]


def norm(x: Tensor) -> Tensor:
    """Divide a row by its root mean square."""
    return rms_norm(x, x.shape[-1:], eps=EPS)


def divisor(x: Tensor) -> Tensor:
    """Return the root mean square of a row."""
    return (x.float().square().mean(-1, keepdim=True) + EPS).sqrt().to(x.dtype)


def unturned(x: Tensor, w: Sublayer, branch: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """No rotation: x + a·W."""
    read = linear(norm(x), w.read)
    return x + linear(branch(read), w.write), read


def turned(x: Tensor, w: Sublayer, branch: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Turn the stream, then add, as the paper does: x·S + a·W."""
    read = linear(norm(x), w.read)
    return linear(x, w.turn) + linear(branch(read), w.write), read


def turned_addmm(
    x: Tensor, w: Sublayer, branch: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Have the second product add the first's."""
    read = linear(norm(x), w.read)
    return torch.addmm(linear(x, w.turn), branch(read), w.write.t()), read


def turned_joined(
    x: Tensor, w: Sublayer, branch: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """One product: [a ‖ x]·[W ; S]."""
    read = linear(norm(x), w.read)
    return linear(torch.cat([branch(read), x], -1), w.write_turn), read


def low_rank(x: Tensor, w: Sublayer, branch: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Three products beside those of the branch: x + x·A·B + a·W."""
    read = linear(norm(x), w.read)
    return x + linear(linear(x, w.down), w.up) + linear(branch(read), w.write), read


def low_rank_up_joined(
    x: Tensor, w: Sublayer, branch: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """B joined with W: x + [a ‖ x·A]·[W ; B]."""
    read = linear(norm(x), w.read)
    return x + linear(torch.cat([branch(read), linear(x, w.down)], -1), w.write_up), read


def low_rank_joined(
    x: Tensor, w: Sublayer, branch: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """A joined with what reads the normed stream, too, and the norm's divisor multiplied back."""
    read, u = torch.split(linear(norm(x), w.read_down), [len(w.read), len(w.down)], dim=-1)
    return x + linear(torch.cat([branch(read), u * divisor(x)], -1), w.write_up), read


def served_attention(x: Tensor, w: Sublayer, room: Tensor) -> Tensor:
    """As sliceserve runs it: u written beside a where that lies, the product added where x lies."""
    rank = len(w.down)
    read, u = torch.split(linear(norm(x), w.read_down), [len(w.read), rank], dim=-1)
    room[:, -rank:] = u * divisor(x)
    accumulate(x, room, w.write_up)
    return read


def served_mlp(x: Tensor, w: Sublayer) -> None:
    """As sliceserve runs it: the norm waits until after the product that reads."""
    accumulate(x, gated(x, linear(x, w.read_down), len(w.down), EPS), w.write_up)


FORMS: dict[str, Form] = {
    "no rotation": unturned,
    "x·S, then add (the paper)": turned,
    "addmm": turned_addmm,
    "one product [a ‖ x]·[W ; S]": turned_joined,
    "low-rank: x·A·B beside": low_rank,
    "low-rank: B joined": low_rank_up_joined,
    "low-rank: A and B joined": low_rank_joined,
}
SERVED = "low-rank, as served"


def activated(read: Tensor) -> Tensor:
    """Compute silu(gate)·up."""
    gate, up = read.chunk(2, dim=-1)
    return silu(gate) * up


def layer(
    form: Form, x: Tensor, attended: Tensor, attention: Sublayer, mlp: Sublayer
) -> tuple[Tensor, Tensor]:
    """Run a layer; also return what attention would read, so that it is computed."""
    x, read = form(x, attention, lambda _: attended)
    x, _ = form(x, mlp, activated)
    return x, read


def served_layer(
    x: Tensor, room: Tensor, attention: Sublayer, mlp: Sublayer
) -> tuple[Tensor, Tensor]:
    """Run a layer as sliceserve does; the last columns of `room` are overwritten, and x is."""
    read = served_attention(x, attention, room)
    served_mlp(x, mlp)
    return x, read


def measure(shape: str, counts: list[int]) -> list[dict[str, float]]:
    """Return the microseconds a layer takes in each form, the dense one's first, by tokens."""
    config = dense_config(shape)
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    width, rank = sliced_width(hidden, 0.25, 128), default_rank(hidden)

    def sublayers(size: int) -> tuple[Sublayer, Sublayer]:
        return (
            Sublayer.draw(size, hidden + 2 * keys, hidden, rank),
            Sublayer.draw(size, 2 * inner, inner, rank),
        )

    full, sliced = sublayers(hidden), sublayers(width)
    torch.compiler.reset()
    layers = {name: torch.compile(partial(layer, form)) for name, form in FORMS.items()}
    dense, ours = torch.compile(partial(layer, unturned)), torch.compile(served_layer)
    found = []
    for tokens in counts:

        def random(columns: int, tokens: int = tokens) -> Tensor:
            drawn = torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")
            if tokens > 1:  # as in vLLM, what is compiled serves any number of tokens
                torch._dynamo.mark_dynamic(drawn, 0)
            return drawn

        x, attended = random(width), random(hidden)
        timed: dict[str, Callable[[], object]] = {
            "dense": partial(dense, random(hidden), attended, *full)
        }
        timed |= {name: partial(run, x, attended, *sliced) for name, run in layers.items()}
        timed[SERVED] = partial(ours, random(width), random(hidden + rank), *sliced)
        times = seconds_in_turn(list(timed.values()), CALLS, REPLAYS)
        found.append({name: time * 1e6 for name, time in zip(timed, times, strict=True)})
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shapes", nargs="+", choices=GATED)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 512, 8192])
    options = parser.parse_args()
    # All forms of a layer are one function to the compiler.
    torch._dynamo.config.recompile_limit = 4 * len(FORMS)
    heads = " | ".join(f"{count} tokens" for count in options.tokens)
    print(f"| shape | form | {heads} |")
    print("| --- | --- |" + " ---: |" * len(options.tokens), flush=True)
    for shape in options.shapes:
        columns = measure(shape, options.tokens)
        for name in columns[0]:
            cells = (
                f"{column[name]:,.1f} ({column[name] / column['dense']:.3f})" for column in columns
            )
            print(f"| {shape} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
