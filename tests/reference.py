"""SliceGPT's formulas for Llama once more, written down independently, in float64.

Everything is held in full: the residual keeps all D columns and is projected by P = U·Uᵀ at every
place, which is what deleting D - d rotated columns means. No code of the package is used.
"""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


class Reference:
    """A Llama whose residual stream is projected at each place on its principal directions."""

    def __init__(self, directory: str, width: int) -> None:
        self.hf = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
        self.config = self.hf.config
        self.weights = dict(self.hf.named_parameters())
        self.width = width
        self.projections: list[Tensor] = []

    @torch.no_grad()
    def calibrate(self, ids: Tensor) -> None:
        """Find the projections, each with what comes before projected already."""
        self.projections = []
        self._run(ids, calibrating=True)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        return self._run(ids, calibrating=False)

    def _run(self, ids: Tensor, calibrating: bool) -> Tensor:
        x = self.weights["model.embed_tokens.weight"][ids]
        place = 0
        x = self._project(x, place, calibrating)
        for layer in range(self.config.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            for norm, block in (
                ("input_layernorm", self._attention),
                ("post_attention_layernorm", self._mlp),
            ):
                x = x + block(prefix, self._norm(x, self.weights[f"{prefix}.{norm}.weight"]))
                place += 1
                if place < 2 * self.config.num_hidden_layers:
                    x = self._project(x, place, calibrating)
        x = self._norm(x, self.weights["model.norm.weight"])
        return x @ self.weights["lm_head.weight"].T

    def _project(self, x: Tensor, place: int, calibrating: bool) -> Tensor:
        if calibrating:
            rows = x.flatten(0, 1)
            left = torch.linalg.svd(rows.T @ rows).U[:, : self.width]
            self.projections.append(left @ left.T)
        return x @ self.projections[place]

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        mean = (x**2).sum(-1, keepdim=True) / self.config.hidden_size
        return x / torch.sqrt(mean + self.config.rms_norm_eps) * weight

    def _attention(self, prefix: str, x: Tensor) -> Tensor:
        def heads(name: str, count: int) -> Tensor:
            y = x @ self.weights[f"{prefix}.self_attn.{name}.weight"].T
            return y.unflatten(-1, (count, self.config.head_dim)).transpose(1, 2)

        queries, groups = self.config.num_attention_heads, self.config.num_key_value_heads
        q, k, v = heads("q_proj", queries), heads("k_proj", groups), heads("v_proj", groups)
        positions = torch.arange(x.shape[1])
        cos, sin = self.hf.model.rotary_emb(x, positions.unsqueeze(0))
        q, k = (y * cos + torch.cat([-y[..., 16:], y[..., :16]], -1) * sin for y in (q, k))
        k, v = (y.repeat_interleave(queries // groups, dim=1) for y in (k, v))
        scores = q @ k.transpose(-1, -2) / self.config.head_dim**0.5
        future = positions[None, :] > positions[:, None]
        mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        return (
            mixed.transpose(1, 2).flatten(2) @ self.weights[f"{prefix}.self_attn.o_proj.weight"].T
        )

    def _mlp(self, prefix: str, x: Tensor) -> Tensor:
        gate, up, down = (
            self.weights[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")
        )
        z = x @ gate.T
        return (z * torch.sigmoid(z) * (x @ up.T)) @ down.T
