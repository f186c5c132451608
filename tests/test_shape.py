from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OTHER_CONFIGS, save_tiny, tiny_config

from sliceserve.slicing.dense import open_dense_model
from sliceserve.slicing.errors import UserError
from sliceserve.slicing.job import SliceOptions, run_slice
from sliceserve.slicing.shape import choose_shape, default_multiple, widest

SMALL: dict[str, Any] = {"samples": 8, "sequence_length": 64, "round_to": 4}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rotation": "shared", "refit": "full"},
        {"rotation": "dense", "basis": "pca", "refit": "none"},
    ],
)
def test_the_target_is_met_and_four_more_columns_would_not(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = tiny_config() if name == "llama" else OTHER_CONFIGS[name]
    dense = save_tiny(tmp_path / "dense", config, torch.float32)
    output = tmp_path / "out"
    options = SliceOptions(str(dense), output, target_params=0.85, **SMALL | changes)
    summary = run_slice(options, show_progress=False).summary
    model = open_dense_model(str(dense))
    assert summary.sliced_parameters <= 0.85 * model.parameters
    assert summary.sliced_parameters == choose_shape(options, model, torch.float32).parameters
    wider = 1 - (summary.slicing.widths[0] + 4) / config.hidden_size
    more = SliceOptions(str(dense), output, fraction=wider, **SMALL | changes)
    assert choose_shape(more, model, torch.float32).parameters > 0.85 * model.parameters


@pytest.mark.parametrize(
    ("changes", "rotation"),
    [
        ({"fraction": 0.0}, "shared"),
        ({"fraction": 0.125}, "shared"),
        ({"fraction": 0.17}, "low-rank"),
        ({"target_params": 0.95}, "shared"),
        ({"target_params": 0.7}, "low-rank"),
        ({"fraction": 0.125, "rank": 4}, "low-rank"),
        ({"fraction": 0.125, "rotation": "low-rank"}, "low-rank"),
        ({"fraction": 0.25, "rotation": "shared"}, "shared"),
    ],
)
def test_nothing_is_rotated_where_little_is_deleted(
    changes: dict[str, Any], rotation: str, tiny: Path
) -> None:
    options = SliceOptions(str(tiny), Path("x"), round_to=4, **changes)
    shape = choose_shape(options, open_dense_model(str(tiny)), torch.float32)
    assert shape.rotation == rotation
    assert (shape.rank == 0) == (rotation == "shared")


def test_a_target_out_of_reach_is_refused(tiny: Path) -> None:
    model = open_dense_model(str(tiny))
    options = SliceOptions(str(tiny), Path("x"), target_params=0.001)
    with pytest.raises(
        UserError, match=r"--target-params 0\.001 is 298 parameters, and the narrowest"
    ):
        choose_shape(options, model, torch.float32)


def test_wide_models_keep_widths_that_matrix_products_are_fast_at() -> None:
    assert [default_multiple(size) for size in (576, 1024, 2048, 4096, 8192)] == [8, 8, *[128] * 3]


def test_the_widest_that_fits() -> None:
    assert widest(96, 8, lambda width: width <= 50) == 48
    assert widest(96, 8, lambda _: True) == 96
    assert widest(96, 8, lambda _: False) is None
