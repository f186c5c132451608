"""SliceGPT's formulas once more, independent of the package, in float64.

A dense model keeps all D columns, and its residual stream is projected by P = U·Uᵀ at every place:
that is what deleting D - d rotated columns means. Hooks on Transformers' own model do it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

HEAD_NORMS = {"phi": "final_layernorm", "opt": "final_layer_norm"}


def exact_norms(model: nn.Module) -> nn.Module:
    """Put in PyTorch's own RMSNorm: that of Transformers computes in float32 whatever comes."""
    for path, norm in list(model.named_modules()):
        if type(norm).__name__.endswith("RMSNorm"):
            exact = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
            exact.weight = norm.weight
            model.set_submodule(path, exact)
    return model


class Reference:
    """A dense model whose residual stream is projected at each place on its main directions.

    The places: what enters a layer and, unless attention and MLP are parallel, what attention
    leaves, and with `head` what the final norm reads. LayerNorms remove the mean of the stream, so
    it is removed before the projection.
    """

    def __init__(
        self, directory: str, width: int, layers: str, parallel: bool, head: bool = False
    ) -> None:
        dense = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
        self.model: Any = exact_norms(dense.eval())
        self.width = width
        self.projections: list[Tensor] = []
        self.seen = torch.empty(0)
        self.streams: list[Tensor] = []
        stack = self.model.get_submodule(layers)
        self.centred = any(isinstance(module, nn.LayerNorm) for module in stack.modules())
        self.places = len(stack) * (1 if parallel else 2)
        if head:
            norm = (
                layers.rpartition(".")[0]
                + "."
                + HEAD_NORMS.get(self.model.config.model_type, "norm")
            )

            def before_head(_norm: nn.Module, args: Any) -> Any:
                return self._project(args[0], self.places - 1)

            self.model.get_submodule(norm).register_forward_pre_hook(before_head)
            self.places += 1
        entering = torch.empty(0)

        def enter(place: int) -> Any:
            def hook(_layer: nn.Module, args: Any, kwargs: Any) -> Any:
                nonlocal entering
                entering = self._project(args[0], place)
                return (entering, *args[1:]), kwargs

            return hook

        def after_attention(place: int) -> Any:
            def hook(_attention: nn.Module, _args: Any, outputs: Any) -> Any:
                stream = self._project(entering + outputs[0], place)
                return (stream - entering, *outputs[1:])

            return hook

        for index, layer in enumerate(stack):
            first = index if parallel else 2 * index
            layer.register_forward_pre_hook(enter(first), with_kwargs=True)
            if not parallel:
                layer.self_attn.register_forward_hook(after_attention(first + 1))

    def _project(self, stream: Tensor, place: int) -> Tensor:
        if self.centred:
            stream = stream - stream.mean(-1, keepdim=True)
        if place == len(self.projections):
            self.seen = stream
        self.streams.append(stream)
        return stream @ self.projections[place] if place < len(self.projections) else stream

    def survey(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the second moments of stream and gradient at every place of the dense model."""
        self.streams = []
        scores = self.model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(scores, ids[:, 1:].flatten(), reduction="sum")
        gradients = torch.autograd.grad(loss, self.streams)
        both = zip(self.streams, gradients, strict=True)
        rows = [(x.detach().flatten(0, 1), g.flatten(0, 1)) for x, g in both]
        return [(x.T @ x, g.T @ g) for x, g in rows]

    @torch.no_grad()
    def calibrate(self, ids: Tensor) -> None:
        """Find the projections, each with what comes before projected already."""
        self.projections = []
        for _ in range(self.places):
            self.model(input_ids=ids)
            rows = self.seen.flatten(0, 1)
            main = torch.linalg.svd(rows.T @ rows).U[:, : self.width]
            self.projections.append(main @ main.T)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        result: Tensor = self.model(input_ids=ids).logits
        return result
