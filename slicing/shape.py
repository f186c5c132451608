"""The shape of the sliced model: widths and ranks, from a fraction or from parameters to keep."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from sliceserve.slicing.config import SlicedConfig, sliced_config
from sliceserve.slicing.dense import DenseOutline
from sliceserve.slicing.errors import UserError
from sliceserve.slicing.modeling import expected_shapes
from sliceserve.slicing.places import SlicePlan
from sliceserve.slicing.rotations import RankRule, auto_rank, default_rank, fixed_rank
from sliceserve.slicing.survey import SurveyPlan

if TYPE_CHECKING:
    from sliceserve.slicing.job import SliceOptions

FRACTION = 0.25
WIDE = 2048  # see `default_multiple`
SHARED_UP_TO = 1 / 8  # of hidden_size deleted, see `choose_shape`


@dataclass(frozen=True)
class Shape:
    """What a slicing run is to make of a model.

    Attributes:
        model: the dense model.
        dtype: of the sliced weights.
        rotation: the form of the rotations.
        widths: columns to keep at each place.
        rank: of every rotation, None if they are whole; with "auto", the most there can be.
        rank_rule: how it is chosen at each place, None if they are whole.
        tied: whether the head stays the embedding.

    """

    model: DenseOutline
    dtype: torch.dtype
    rotation: str
    widths: list[int]
    rank: int | None
    rank_rule: RankRule | None
    tied: bool

    def config(self, ranks: list[int | None]) -> SlicedConfig:
        """Return the config of the sliced model."""
        return sliced_config(
            self.model.config,
            self.model.architecture,
            self.widths,
            ranks,
            self.model.parameters,
            str(self.dtype).removeprefix("torch."),
            self.tied,
        )

    @property
    def parameters(self) -> int:
        """Numbers that the sliced model holds at most, rotations and head included."""
        config = self.config([self.rank] * (len(self.widths) - 1))
        return sum(torch.Size(shape).numel() for shape in expected_shapes(config).values())

    def survey_plan(self, options: "SliceOptions") -> SurveyPlan:
        """Return what a survey is to find."""
        return SurveyPlan(
            self.widths,
            output_aware=options.basis == "output-aware",
            shared=self.rotation == "shared",
            tied=self.tied,
        )

    def slice_plan(self, options: "SliceOptions") -> SlicePlan:
        """Return what the slicing loop is to make."""
        return SlicePlan(
            self.widths,
            self.rank_rule,
            refit_writes=options.refit != "none",
            refit_reads=options.refit == "full",
            tied=self.tied,
        )


def choose_shape(options: "SliceOptions", model: DenseOutline, dtype: torch.dtype) -> Shape:
    """Choose the form of the rotations, unless it is given, widths and ranks.

    One basis for all places, and so nothing to rotate, where at most an eighth of hidden_size is
    deleted: low-rank rotations gain next to nothing there (docs/quality.md), and cost time.

    Raises:
        UserError: no width keeps as little as that, or none would be left.

    """
    if options.rotation:
        return _shape_of_form(options, options.rotation, model, dtype)
    if options.rank is None:
        shape = _shape_of_form(options, "shared", model, dtype)
        if shape.widths[0] >= (1 - SHARED_UP_TO) * model.config.hidden_size:
            return shape
    return _shape_of_form(options, "low-rank", model, dtype)


def _shape_of_form(
    options: "SliceOptions", rotation: str, model: DenseOutline, dtype: torch.dtype
) -> Shape:
    hidden_size = int(model.config.hidden_size)
    places = model.architecture.places(model.config.num_hidden_layers)
    final_norm = model.skeleton.get_submodule(model.architecture.final_norm)
    # A LayerNorm model's embedding is centred and its head is not: they differ.
    tied = (
        options.surveys
        and bool(model.config.tie_word_embeddings)
        and not isinstance(final_norm, nn.LayerNorm)
    )

    def shape_of(width: int) -> Shape:
        deleted = hidden_size - width
        rank: int | None = None
        rule: RankRule | None = None
        if rotation == "shared":
            rank, rule = 0, fixed_rank(0)
        elif rotation == "low-rank" and options.rank == "auto":
            rank, rule = min(deleted, width), auto_rank
        elif rotation == "low-rank":
            given = options.rank if isinstance(options.rank, int) else default_rank(hidden_size)
            rank, rule = min(given, deleted, width), fixed_rank(given)
        last = hidden_size if rotation == "dense" else width
        return Shape(model, dtype, rotation, [width] * (places - 1) + [last], rank, rule, tied)

    multiple = options.round_to or default_multiple(hidden_size)
    if options.target_params is None:
        fraction = FRACTION if options.fraction is None else options.fraction
        return shape_of(sliced_width(hidden_size, fraction, multiple))
    most = int(options.target_params * model.parameters)
    width = widest(hidden_size, multiple, lambda width: shape_of(width).parameters <= most)
    if width is None:
        least = shape_of(multiple).parameters
        raise UserError(
            f"--target-params {options.target_params} is {most:,} parameters, and the narrowest "
            f"model has {least:,}"
        )
    return shape_of(width)


def default_multiple(hidden_size: int) -> int:
    """Return what the width is a multiple of unless told.

    Matrix products of other widths than multiples of 64 are up to a quarter slower on a GPU
    (docs/speed.md), and kernels for 4-bit weights need multiples of 128. In small models, whose
    time is not spent in products, such steps would be too coarse.
    """
    return 128 if hidden_size >= WIDE else 8


def sliced_width(hidden_size: int, fraction: float, round_to: int) -> int:
    """Return the columns kept: (1 - fraction)·hidden_size, down to a multiple of `round_to`.

    A fraction of 0 keeps all columns, whatever the multiple.

    Raises:
        UserError: nothing would be left.

    """
    if fraction == 0:
        return hidden_size
    # The tiny addend keeps a product such as 0.7·1000 from falling just below its whole number.
    width = int((1 - fraction) * hidden_size + 1e-9) // round_to * round_to
    if width < 1:
        raise UserError(
            f"--fraction {fraction} with --round-to {round_to} leaves none of the "
            f"{hidden_size} columns"
        )
    return width


def widest(hidden_size: int, round_to: int, fits: Callable[[int], bool]) -> int | None:
    """Return the largest multiple of `round_to` up to hidden_size that fits, None if none does."""
    low, high = 0, hidden_size // round_to
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle * round_to):
            low = middle
        else:
            high = middle - 1
    return low * round_to or None
