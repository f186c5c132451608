"""A product added to the residual stream where the stream lies: x ← x + a·Wᵀ.

a [tokens, in], W [out, in], x [tokens, out]. Left to itself the compiler has the product add x,
too, but copies x first, because it writes to another place than it reads from.
"""

import torch
from torch import Tensor


@torch.library.custom_op("sliceserve::accumulate", mutates_args=("x",))
def accumulate(x: Tensor, a: Tensor, weight: Tensor) -> None:
    """Add a product to x in place.

    Args:
        x: the residual stream, [tokens, out].
        a: what the branches wrote, [tokens, in].
        weight: [out, in].

    Raises:
        RuntimeError: the shapes or dtypes do not fit each other.

    """
    x.addmm_(a, weight.t())


@accumulate.register_fake
def _(x: Tensor, a: Tensor, weight: Tensor) -> None:
    pass
