"""`sliceserve benchmark` through the real vLLM, and what the report makes of it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

import pytest
from local_hub import NAME, Hub, serving_hub
from server_process import ENVIRONMENT
from test_report import Page
from test_vllm import read_results, run_script

from sliceserve.server.speed import BatchSpeed, Speed, SpeedOptions, describe_speed, measure_speed
from sliceserve.slicing.cli import main
from sliceserve.slicing.errors import MachineError, UserError
from sliceserve.slicing.source import Location

COMMIT = "0123456789abcdef" * 2 + "01234567"
SHORT = ["--input-len", "8", "--output-len", "5", "--repeats", "1", "--enforce-eager"]


def run_benchmark(*arguments: str) -> str:
    """What the command prints."""
    command = [Path(sys.executable).with_name("sliceserve"), "benchmark", *arguments, *SHORT]
    variables = os.environ | ENVIRONMENT
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def printed(tiny: Path, tiny_sliced: Path, plot: Path) -> dict[str, Any]:
    """What the command prints as JSON, of two models."""
    options = ["--against", str(tiny), "--batch-size", "1", "3", "--json"]
    options += ["--plot", str(plot)]
    fields: dict[str, Any] = json.loads(run_benchmark(str(tiny_sliced), *options))
    return fields


@pytest.fixture(scope="module")
def plot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the command writes its page."""
    return tmp_path_factory.mktemp("plot") / "new" / "speed.html"


def test_models_are_measured_side_by_side(
    printed: dict[str, Any], tiny: Path, tiny_sliced: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(printed["speed"]) == [str(tiny), str(tiny_sliced)]
    assert main(["inspect", str(tiny_sliced), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    counts = [speed["parameters"] for speed in printed["speed"].values()]
    assert counts == [summary["dense_parameters"], summary["sliced_parameters"]]
    for speed in printed["speed"].values():
        assert [batch["batch_size"] for batch in speed["batches"]] == [1, 3]
        for batch in speed["batches"]:
            seconds = batch["ttft"] + 4 * batch["itl"]
            assert batch["output_throughput"] * seconds == pytest.approx(5 * batch["batch_size"])
            tokens = 8 * batch["batch_size"]
            assert batch["prompt_throughput"] * batch["ttft"] == pytest.approx(tokens)


def test_the_plot_has_both_models_at_every_batch(printed: dict[str, Any], plot: Path) -> None:
    page = Page(plot.read_text())
    for model, speed in printed["speed"].items():
        shown = [row[1:6] for row in page.rows if row[:1] == [model]]
        wanted = [(one["output_throughput"], one["prompt_throughput"]) for one in speed["batches"]]
        assert [row[0] for row in shown] == ["1", "3"]
        assert [row[3:] for row in shown] == [[f"{a:,.1f}", f"{b:,.0f}"] for a, b in wanted]
    assert ["input_len", "8"] in page.rows
    assert plot.read_text().count("<svg") == 3


def test_a_plot_that_cannot_be_written_is_named_before_anything_is_measured(
    tiny_sliced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", str(tiny_sliced), "--plot", str(tmp_path)]) == 2
    assert f"--plot {str(tmp_path)!r} is a directory" in capsys.readouterr().err


def test_a_quantisation_that_vllm_does_not_know_is_named(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", str(tiny), "--quantization", "nonsense"]) == 2
    assert "--quantization 'nonsense' is none of " in capsys.readouterr().err


def test_the_report_shows_every_batch_and_a_chart(
    printed: dict[str, Any], tiny_sliced: Path, tmp_path: Path
) -> None:
    results, output = tmp_path / "speed.json", tmp_path / "page.html"
    results.write_text(json.dumps(printed))
    arguments = ["report", str(tiny_sliced), "--output", str(output), "--results", str(results)]
    assert main(arguments) == 0
    page = Page(output.read_text())
    for model, speed in printed["speed"].items():
        shown = [row[1:5] for row in page.rows if row[:1] == [model]]
        assert shown == [
            [
                str(batch["batch_size"]),
                f"{1e3 * batch['ttft']:.2f}",
                f"{1e3 * batch['itl']:.2f}",
                f"{batch['output_throughput']:,.1f}",
            ]
            for batch in speed["batches"]
        ]
    titles = [value for key, value in page.attributes if key == "aria-label"]
    assert {"Milliseconds a token", "Tokens a second"} <= set(titles)


def test_the_table_has_the_ratio_to_the_first_model() -> None:
    def speed(parameters: int, itl: float) -> Speed:
        batch = BatchSpeed(4, ttft=0.5, itl=itl, output_throughput=4 / itl, prompt_throughput=8)
        return Speed(parameters, 20.0, 4096, "GPU", "bfloat16", "0.32.0", (batch,))

    found = {"/a/dense": speed(1000, 0.1), "/a/sliced": speed(750, 0.08)}
    options = SpeedOptions(batch_size=(4,))
    rows = [line.split() for line in describe_speed(found, options).splitlines()]
    assert rows[0] == ["dense", "sliced", "ratio"]
    assert rows[1] == ["parameters", "1,000", "750", "0.750"]
    assert ["batch", "4:", "ITL,", "ms", "100.00", "80.00", "0.800"] in rows
    assert ["batch", "4:", "tokens/s", "40.0", "50.0", "1.250"] in rows
    assert "commit" not in rows[-1]
    fetched = {"owner/dense": replace(found["/a/dense"], commit=COMMIT), **found}
    assert describe_speed(fetched, options).splitlines()[-1] == f"owner/dense: commit {COMMIT}"


def test_dummy_weights_are_measured(tiny_sliced: Path) -> None:
    options = ["--load-format", "dummy", "--dtype", "float32", "--batch-size", "1"]
    assert "batch 1: tokens/s" in run_benchmark(str(tiny_sliced), *options)


def test_dummy_rotations_keep_the_stream(tiny_sliced: Path) -> None:
    request = {"variants": [{"enable_lora": beside} for beside in (False, True)]}
    run = run_script("vllm_dummies.py", [tiny_sliced], request, {"dtype": "float32"})
    zeros, *kept = read_results(run, 3)
    assert zeros["rotations"] == 0
    assert max(ratios(zeros["sizes"])) < 1e-3
    for found in kept:
        assert found["rotations"] == 2 * (len(found["sizes"]) - 1)
        assert ratios(found["sizes"]) == pytest.approx([1.0, 1.0], rel=0.5)


def ratios(sizes: list[float]) -> list[float]:
    """The stream after the first layer and the last, to that before them."""
    return [sizes[1] / sizes[0], sizes[-1] / sizes[0]]


def test_what_cannot_be_measured_is_said_in_one_sentence(
    tiny: Path, smollm2_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", str(tiny), "--against", str(tmp_path / "none")]) == 2
    assert "none" in capfd.readouterr().err.splitlines()[-1]
    assert main(["benchmark", str(smollm2_gguf)]) == 2
    assert "is a GGUF file" in capfd.readouterr().err.splitlines()[-1]
    assert main(["benchmark", str(tiny), "--input-len", "600"]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("sliceserve: error: vLLM cannot load ")
    assert "max_model_len" in last


def test_the_model_on_the_hub_is_measured_at_its_revision(
    tiny: Path,
    tiny_sliced: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    hub = Hub({COMMIT: tiny, "f" * 40: tmp_path}, {"main": "f" * 40, "v1": COMMIT})
    command = ["benchmark", str(tiny_sliced), "--against", NAME, "--batch-size", "1", "--json"]
    with serving_hub(hub, tmp_path / "cache", monkeypatch):
        assert main([*command, *SHORT, "--revision", "v1"]) == 0
        printed = json.loads(capfd.readouterr().out)
        assert main([*command, "--revision", "v2"]) == 2
        assert f"'{NAME}' at --revision 'v2' is no directory" in capfd.readouterr().err
        hub.refusal = (503, "")
        assert main(command) == 1
        assert f"'{NAME}' is no directory here and the hub did" in capfd.readouterr().err
    assert printed["options"]["revision"] == "v1"
    commits = {model: speed["commit"] for model, speed in printed["speed"].items()}
    assert commits == {NAME: COMMIT, str(tiny_sliced): None}
    assert {commit for commit, _ in hub.fetched} == {COMMIT}


def test_memory_that_the_machine_lacks_is_no_mistake_of_the_users(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in (ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1000000"}).items():
        monkeypatch.setenv(name, value)
    assert main(["benchmark", str(tiny), *SHORT]) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"sliceserve: error: vLLM cannot load '{tiny}': ")
    assert "memory" in last.lower()


def end_at_once(*_: object) -> NoReturn:
    """End this process as the kernel does when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("killed, and still here")


def test_a_process_that_is_killed_is_no_mistake_of_the_users(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sliceserve.server.speed.measure_speed", end_at_once)
    assert main(["benchmark", str(tiny)]) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"sliceserve: error: the process that ran '{tiny}' ended early")


@pytest.fixture
def passing_variables() -> Iterator[None]:
    """What is set in the environment meanwhile is gone afterwards."""
    with mock.patch.dict(os.environ):
        yield


def raising(error: Exception) -> Any:
    """Something to call that raises."""

    def call(*_: object, **__: object) -> NoReturn:
        raise error

    return call


@pytest.mark.usefixtures("passing_variables")
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(28, "No space left on device"), MachineError),
        (OSError(2, "No such file or directory"), UserError),
        (RuntimeError("Engine core initialization failed. See root cause above."), MachineError),
        (ValueError("No available memory for the cache blocks."), MachineError),
        (ValueError("Free memory on device cuda:0 (1/80 GiB) is less than wanted"), MachineError),
        (ValueError("--dtype float32 cannot be used with w4a16"), UserError),
        (KeyError("model.layers.0"), UserError),
    ],
)
def test_why_an_engine_does_not_start_tells_whose_mistake_it_is(
    error: Exception, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.LLM", raising(error))
    with pytest.raises(kind, match=r"^vLLM cannot load 'name': ") as raised:
        measure_speed("name", Location(tmp_path, None), 1, SpeedOptions())
    assert type(raised.value) is kind


@pytest.mark.usefixtures("passing_variables")
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_an_engine_that_ends_while_it_runs_is_no_mistake_of_the_users(
    load_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 9))
    ended = raising(ValueError("the engine has died"))
    engine = SimpleNamespace(
        llm_engine=SimpleNamespace(vllm_config=config), generate=ended, apply_model=ended
    )
    monkeypatch.setattr("vllm.LLM", lambda **_: engine)
    options = SpeedOptions(load_format=load_format)
    with pytest.raises(MachineError, match="vLLM failed while it ran 'name': the engine has died"):
        measure_speed("name", Location(tmp_path, None), 1, options)
