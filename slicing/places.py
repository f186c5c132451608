"""The places of the residual stream as a slicing run passes them: bases, and rotations between."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sliceserve.slicing.layers import DenseLayers
from sliceserve.slicing.moments import SecondMoment, principal_basis
from sliceserve.slicing.rotations import RankRule, align
from sliceserve.slicing.stopwatch import Stopwatch
from sliceserve.slicing.survey import Survey


@dataclass(frozen=True)
class SlicePlan:
    """What a slicing run is to make.

    Attributes:
        widths: columns to keep at each place.
        rank_rule: says how many directions the rotation between two places turns; None keeps
            rotations whole.
        refit_writes: whether linears that write the stream, and the head, are refitted to the
            dense stream.
        refit_reads: whether those that read it are too.
        tied: whether the head is the embedding, behind a matrix of its own.

    """

    widths: list[int]
    rank_rule: RankRule | None = None
    refit_writes: bool = False
    refit_reads: bool = False
    tied: bool = False


class Places:
    """The basis of the place where a run is, and what it has found on the way there.

    Attributes:
        basis: U of the place, [hidden_size, width] in float64.
        ranks: of the rotations so far; None for a whole matrix.
        spectrum: eigenvalues of what the bases were taken from, falling, float64
            [places, hidden_size].

    """

    def __init__(
        self, layers: DenseLayers, plan: SlicePlan, survey: Survey | None, stopwatch: Stopwatch
    ) -> None:
        """Stand before the first place; the arguments are those of `Slicer`."""
        self.layers, self.plan, self.survey, self.stopwatch = layers, plan, survey, stopwatch
        self.hidden_size = int(layers.model.config.hidden_size)
        self.device, self.dtype = layers.device, layers.dtype
        self.basis = torch.empty(0)
        self.ranks: list[int | None] = []
        self.spectrum = torch.empty(0, self.hidden_size, dtype=torch.float64)

    def state(self) -> dict[str, Tensor]:
        """Return what `restore` needs."""
        ranks = torch.tensor([-1 if rank is None else rank for rank in self.ranks])
        return {"basis": self.basis, "spectrum": self.spectrum, "ranks": ranks}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Stand where a run before stood."""
        self.basis, self.spectrum = state["basis"].to(self.device), state["spectrum"]
        self.ranks = [None if rank < 0 else rank for rank in state["ranks"].tolist()]

    def rotation(self, place: int) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
        """Go on to the surveyed basis of a place.

        Returns:
            The weights of the rotation that leads there, by their names, and the rotation.

        """
        before, after = self.basis, self.surveyed_basis(place)
        rule = self.plan.rank_rule
        if self.survey is not None and self.survey.plan.shared:
            self.ranks.append(0)
            return {}, lambda x: x
        if rule is None or before.shape != after.shape:
            self.basis = after
            self.ranks.append(None)
            turned = before.T @ after
            narrow = turned.to(self.dtype)
            return {"weight": turned.T}, lambda x: x @ narrow
        with self.stopwatch("eigenvectors"):
            alignment = align(before, after)
        # No more than the deleted directions can turn.
        rank = min(rule(alignment.cosines), self.hidden_size - before.shape[1])
        self.basis = alignment.basis
        self.ranks.append(rank)
        down, up = alignment.factors(rank)
        if not rank:
            return {}, lambda x: x
        factors = down.to(self.dtype), up.to(self.dtype)
        return {"down.weight": down.T, "up.weight": up.T}, (
            lambda x: x + x @ factors[0] @ factors[1]
        )

    def is_whole(self, place: int) -> bool:
        """Whether the stream comes back to the dense model's own columns at a place."""
        last = len(self.plan.widths) - 1
        full = self.plan.widths[last] == self.hidden_size
        return place == last and full and self.plan.rank_rule is None

    def identity(self) -> Tensor:
        """Return the basis of a place that is whole."""
        return torch.eye(self.hidden_size, dtype=torch.float64, device=self.device)

    def surveyed_basis(self, place: int) -> Tensor:
        """Return the basis that the survey has for a place."""
        assert self.survey is not None  # noqa: S101 - what calls this has one
        if self.is_whole(place):
            return self.identity()
        with self.stopwatch("eigenvectors"):
            basis, values = self.survey.basis(place)
        self.spectrum = torch.cat([self.spectrum, values.unsqueeze(0)])
        return basis

    def principal_basis(self, moment: SecondMoment, place: int) -> Tensor:
        """Find the principal basis of a place from the moment there."""
        total, width = moment.sum, self.plan.widths[place]
        self.layers.check_finite(total, place)
        with self.stopwatch("eigenvectors"):
            basis, spectrum = principal_basis(total, width, self.layers.centred)
            self.spectrum = torch.cat([self.spectrum, spectrum.cpu().unsqueeze(0)])
        self.layers.warn_of_rank(spectrum, width, place)
        return basis
