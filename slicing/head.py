"""The head of a sliced model: the final norm folded in, tied to the embedding or of its own."""

import torch
from torch import Tensor

from sliceserve.slicing.layers import DenseLayers
from sliceserve.slicing.modeling import HEAD_MAP
from sliceserve.slicing.parts import PartWriter
from sliceserve.slicing.survey import Survey


def fold_head(
    layers: DenseLayers, reads: Tensor, survey: Survey | None, writer: PartWriter, whole: bool
) -> None:
    """Write the head H·diag(g)·R, with the final norm's scale g, and its shift as a bias.

    Args:
        layers: of the dense model.
        reads: R, from the dense model's normed stream to the sliced one's, [hidden_size, width].
        survey: of a model whose head stays tied to the embedding; None if it does not.
        writer: takes the tensors.
        whole: whether the stream has come back to the dense model's own columns.

    """
    architecture = layers.model.architecture
    names = dict(layers.model.skeleton.named_parameters())
    scale, shift = layers.final_norm()
    name, bias = f"{architecture.head}.weight", f"{architecture.head}.bias"
    hidden_size, width = reads.shape
    reads = scale.unsqueeze(1) * reads * (hidden_size / width) ** 0.5
    table = layers.read(name)
    if survey is not None:
        writer.add(f"{HEAD_MAP}.weight", _head_map(survey, reads))
    elif whole:
        writer.add(name, layers.by_rows(table, lambda rows: rows * scale, writer.dtype))
    else:
        writer.add(name, layers.by_rows(table, lambda rows: rows @ reads, writer.dtype))
    offset = layers.wide(layers.read(bias)) if bias in names else None
    if shift is not None:
        folded = layers.by_rows(table, lambda rows: rows @ shift, writer.dtype)
        offset = folded if offset is None else offset + folded
    if offset is not None:
        writer.add(bias, offset)


def _head_map(survey: Survey, reads: Tensor) -> Tensor:
    """Return the matrix T before a tied head, as a linear's weight [widths[0], widths[-1]].

    E·U₀·T stands for the head E·R, R [D, widths[-1]]: the best in the mean curvature F of the
    loss in the logits, T = (U₀ᵀFU₀)⁻¹U₀ᵀF·R.
    """
    first, _ = survey.basis(0)
    projected = first.T @ survey.head_metric()
    solution: Tensor = torch.linalg.solve(projected @ first, projected @ reads)
    return solution
