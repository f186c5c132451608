"""What attention needs of the compiler to write beside columns that are written later."""

from typing import Any

import torch
from torch import Tensor
from torch._inductor import standalone_compile


def test_what_crosses_to_attention_lies_in_what_goes_around_it() -> None:
    """vLLM compiles what is before attention alone, and runs attention as it is."""

    def before(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query = (x @ weight)[:, :32] * 2
        joined = query.new_empty(query.shape[0], 40)
        return query, joined, joined[:, :32].view(-1, 2, 16)

    def after(stream: Tensor, joined: Tensor, beside: Tensor, weight: Tensor) -> Tensor:
        joined[..., 32:] = beside
        return stream + joined @ weight.T

    def alone(graph: Any, inputs: Any) -> Any:
        return standalone_compile(graph, inputs, dynamic_shapes="from_tracing_context")

    torch.manual_seed(0)
    x, weight, beside, stream = (torch.randn(*n) for n in ((5, 8), (8, 40), (5, 8), (5, 24)))
    with torch.inference_mode():
        query, joined, output = torch.compile(before, backend=alone, dynamic=True)(x, weight)
        output.copy_(query.view(-1, 2, 16))
        written = torch.randn(24, 40)
        result = torch.compile(after, backend=alone, dynamic=True)(stream, joined, beside, written)
    expected = torch.cat([(x @ weight)[:, :32] * 2, beside], -1)
    torch.testing.assert_close(joined, expected)
    torch.testing.assert_close(result, stream + expected @ written.T)
