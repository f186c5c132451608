"""The script behind the README's table and plot of sizes."""

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from frontier import COMPLETE, DENSE, FORMS, Settings, default_form, measure, plot, table

from sliceserve.slicing.job import SliceOptions, run_slice
from sliceserve.slicing.perplexity import measure_text


def row(form: str, parameters: int, first: float, second: float) -> dict[str, object]:
    return {
        "form": form,
        "target": parameters / 1000,
        "width": None if form == DENSE else 432,
        "parameters": parameters,
        "stored": parameters / 1000,
        "first": first,
        "second": second,
        "seconds": None if form == DENSE else 12.3,
    }


ROWS = [row(DENSE, 1000, 20, 5), row("paper", 900, 40, 20), row("paper", 800, 80, 20)]


def test_a_row_is_what_slice_and_perplexity_give(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "some.txt"
    text.write_text("Rows and columns of matrices are deleted. " * 200)
    settings = Settings(str(tiny), "mixture", [str(text)], 14, 64, [2], "cpu", None)
    for form in FORMS:
        found = measure(settings, form, 0.9, tmp_path / form)
        assert found["stored"] <= 0.9
        expected = measure_text(str(tmp_path / form), str(text), 64, 2, "cpu")
        assert found["some"] == pytest.approx(expected.perplexity)
    assert measure(settings, DENSE, 1.0, tmp_path)["stored"] == 1


@pytest.mark.parametrize("target", [0.95, 0.7])
def test_the_default_is_what_slice_makes_of_the_target(
    target: float, tiny: Path, tmp_path: Path
) -> None:
    settings = Settings(str(tiny), "mixture", [], 14, 64, [], "cpu", None)
    options = SliceOptions(
        str(tiny), tmp_path / "sliced", target_params=target, samples=14, sequence_length=64
    )
    run_slice(options, show_progress=False)
    record = json.loads((tmp_path / "sliced" / "provenance.json").read_text())["options"]
    form = default_form(settings, target)
    assert {name: record[name] for name in FORMS[form]} == FORMS[form]
    assert COMPLETE[record["rotation"]] == form


def test_the_mean_is_of_the_ratios_to_the_dense_model() -> None:
    lines = table(ROWS, ["first", "second"], {0.8: "paper"}).splitlines()
    assert len(lines) == 2 + len(ROWS)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][-2] == "mean ratio"
    assert [line[0] for line in cells[2:]] == [DENSE, "paper", "**paper**"]
    assert [line[-2] for line in cells[2:]] == ["1.00", f"{math.sqrt(2 * 4):.2f}", "4.00"]


def test_the_plot_has_a_line_a_form_and_a_panel_a_text(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.svg"
    plot(ROWS, ["first", "second"], {0.8: "paper"}, path)
    ids = [element.get("id", "") for element in ElementTree.parse(path).iter()]
    assert sum(name.startswith("axes_") for name in ids) == 2
    again = tmp_path / "again.svg"
    plot(ROWS, ["first", "second"], {0.8: "paper"}, again)
    assert again.read_bytes() == path.read_bytes()
