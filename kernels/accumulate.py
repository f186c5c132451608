"""A product added to the residual stream where the stream lies: x ← x + a·Wᵀ.

a [tokens, in], W [out, in], x [tokens, out]. Left to itself the compiler has the product add x,
too, but copies x first, because it writes to another place than it reads from.
"""

import torch
from torch import Tensor


def reference(x: Tensor, a: Tensor, weight: Tensor) -> Tensor:
    """Return x + a·Wᵀ in plain torch, x as it was."""
    return x + a @ weight.t()


@torch.library.custom_op("sliceserve::accumulate", mutates_args=("x",))
def accumulate(x: Tensor, a: Tensor, weight: Tensor) -> None:
    """Add a product to x in place.

    Args:
        x: the residual stream, [tokens, out].
        a: what the branches wrote, [tokens, in].
        weight: [out, in].

    Raises:
        ValueError: the shapes or dtypes do not fit each other.

    """
    fits = x.shape == (len(a), len(weight)) and a.shape[1:] == weight.shape[1:]
    if not fits or not x.dtype == a.dtype == weight.dtype:
        raise ValueError(
            f"accumulate: x {_told(x)}, a {_told(a)} and weight {_told(weight)} do not fit: "
            "they are [tokens, out], [tokens, in] and [out, in], of one dtype"
        )
    x.addmm_(a, weight.t())


@accumulate.register_fake
def _(x: Tensor, a: Tensor, weight: Tensor) -> None:
    pass


def _told(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
