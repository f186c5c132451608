import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import save_tiny, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from sliceserve.slicing.cli import COMMANDS, main
from sliceserve.slicing.errors import MachineError, UserError, reading

COMMAND = [sys.executable, "-m", "sliceserve.slicing.cli"]


def small(model: Path | str, output: Path, *more: str) -> list[str]:
    """Arguments of a slice that takes a second."""
    return ["slice", str(model), "--output", str(output), "--samples", "4",
            "--sequence-length", "32", *more]  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run arguments that must be refused and return the one sentence."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("sliceserve: ")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["slice"], "MODEL, --output"),
        (["slice", "m", "--output", "o", "--fraction", "1"], "--fraction: 1 is not in [0, 1)"),
        (["slice", "m", "--output", "o", "--fraction", "-0.1"], "-0.1 is not in [0, 1)"),
        (["slice", "m", "--output", "o", "--fraction", "half"], "invalid fraction value: 'half'"),
        (
            ["slice", "m", "--output", "o", "--rank", "4", "--rotation", "shared"],
            "--rank 4 needs --rotation low-rank",
        ),
        (["slice", "m", "--output", "o", "--target-params", "0"], "params: 0 is not in (0, 1]"),
        (
            ["slice", "m", "--output", "o", "--target-params", "0.5", "--fraction", "0.5"],
            "--target-params and --fraction both say",
        ),
        (
            ["slice", "m", "--output", "o", "--target-params", "0.5", "--rank", "auto"],
            "--target-params needs a number as --rank, not 'auto'",
        ),
        (["slice", "m", "--output", "o", "--samples", "1"], "--samples 1 leaves none to fit on"),
        (["slice", "m", "--output", "o", "--rank", "-1"], "--rank: -1 is negative"),
        (["slice", "m", "--output", "o", "--rank", "few"], "--rank: invalid rank value: 'few'"),
        (["slice", "m", "--output", "o", "--samples", "0"], "--samples: 0 is not a positive"),
        (["slice", "m", "--output", "o", "--colour", "red"], "--colour red"),
        (["slice", "no/such/model", "--output", "o"], "MODEL 'no/such/model' does not exist"),
        (["slice", "missing.gguf", "--output", "o"], "MODEL 'missing.gguf' does not exist"),
        (["slice", "m", "--output", "o", "--device", "cuda:99"], "--device 'cuda:99'"),
        (["slice", "m", "--output", "o", "--calibration", "x"], "--calibration 'x' is no file"),
        (["inspect", "no-such-dir"], "DIR 'no-such-dir' is no checkpoint"),
        (["perplexity", "m", "--text", "none.txt"], "--text 'none.txt' is no file"),
        (["perplexity", "m", "--text", "x" * 300], "File name too long"),
        (
            ["perplexity", "m", "--text", "x", "--backend", "vllm", "--device", "cpu"],
            "--device 'cpu': with --backend vllm",
        ),
        (["evaluate", "m", "--tasks", "piqa,no-such"], "--tasks no-such: "),
        (["evaluate", "m", "--tasks", "piqa", "--data", "d"], "--data 'd' holds no piqa/"),
        (["dance"], "'dance'"),
    ],
)
def test_bad_arguments_get_one_sentence(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    assert "out' exists already" in refused(capsys, small(tiny, tmp_path / "out"))


def test_a_short_text_says_how_many_windows_fit(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a" * 100)
    sentence = refused(capsys, small(tiny, tmp_path / "out", "--calibration", str(text)))
    assert "too short for --samples 4 of --sequence-length 32: 3 fit" in sentence
    sentence = refused(
        capsys,
        ["perplexity", str(tiny), "--text", str(text), "--sequence-length", "60", "--samples", "2"],
    )
    assert "--samples 2 of --sequence-length 60: 1 fit" in sentence


def test_text_that_is_not_utf8_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "latin.txt"
    text.write_bytes(b"caf\xe9 " * 100)
    assert "is not UTF-8" in refused(
        capsys, small(tiny, tmp_path / "out", "--calibration", str(text))
    )


def test_a_sliced_model_is_not_sliced_again(
    tiny_sliced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is sliced already" in refused(capsys, small(tiny_sliced, tmp_path / "out"))


def test_a_dense_model_is_not_inspected(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a sliced checkpoint" in refused(capsys, ["inspect", str(tiny)])


def test_a_sequence_longer_than_the_positions_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = small(tiny, tmp_path / "out", "--sequence-length", "513")
    assert "--sequence-length 513 is more than the 512 positions" in refused(capsys, arguments)


def test_what_may_not_be_written_is_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = refused(capsys, small(tiny, Path("/proc/none/out")))
    assert "--output '/proc/none/out' cannot be written: " in sentence


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.EIO, "Input/output error", "x"), "[Errno 5] Input/output error: 'x'"),
        (OSError(errno.ENOSPC, "No space left"), "[Errno 28] No space left"),
        (OSError("a library's own words"), "a library's own words"),
        (MemoryError(), "out of memory: MemoryError"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nAdvice"),
            "out of memory: CUDA out of memory.",
        ),
        (MachineError("the hub sleeps"), "the hub sleeps"),
    ],
)
def test_what_the_machine_fails_in_has_a_code_of_its_own(
    error: Exception,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(**_: object) -> int:
        raise error

    monkeypatch.setitem(COMMANDS, "inspect", fail)
    assert main(["inspect", "anything"]) == 1
    assert capsys.readouterr().err == f"sliceserve: error: {sentence}\n"


def test_an_error_of_the_programs_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> int:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setitem(COMMANDS, "inspect", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        main(["inspect", "anything"])


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.EIO, "Input/output error"), MachineError),
        (OSError(errno.EACCES, "Permission denied"), UserError),
        (OSError("not a tokenizer"), UserError),
        (MemoryError(), MachineError),
        (ValueError("bad bytes"), UserError),
    ],
)
def test_a_file_that_cannot_be_read_is_not_always_the_users_fault(
    error: Exception, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=r"^file 'x' cannot be read: "), reading("file 'x'"):
        raise error


def test_a_host_without_memory_is_one_sentence() -> None:
    """PyTorch's allocation of more than there are addresses fails."""
    command = (
        "import sys, torch; from sliceserve.slicing import cli;"
        "cli.COMMANDS['inspect'] = lambda **_: torch.empty(10**16).numel();"
        "sys.exit(cli.main(['inspect', 'x']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.startswith("sliceserve: error: out of memory: ")
    assert len(result.stderr.splitlines()) == 1


def test_a_write_that_fails_half_way_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    """A file size limit fails the write of the shard like a full disk does."""

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    result = subprocess.run(
        [*COMMAND, *small(tiny, tmp_path / "out")],
        capture_output=True,
        text=True,
        preexec_fn=limit_file_size,
        check=False,
    )
    assert result.returncode == 1, result.stderr
    assert "out' cannot be written: " in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_leaves_nothing(signum: signal.Signals, tiny: Path, tmp_path: Path) -> None:
    arguments = small(tiny, tmp_path / "out", "--samples", "5000")
    with subprocess.Popen(
        [*COMMAND, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, a shell has made them ignore some.
        preexec_fn=lambda: signal.signal(signum, signal.SIG_DFL),
    ) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".out.partial")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signum)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signum, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_that_a_library_hides_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hide(**_: object) -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ValueError("no shape") from None
        return 0

    monkeypatch.setitem(COMMANDS, "inspect", hide)
    assert main(["inspect", "anything"]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.startswith("sliceserve: interrupted")


@pytest.mark.parametrize("option", ["--resume", "--restart"])
def test_who_resumes_is_told_to_go_on(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(COMMANDS, "slice", lambda **_: signal.raise_signal(signal.SIGTERM))
    assert main(["slice", "m", "--output", "o", option]) == 143
    said = "sliceserve: interrupted; the same command goes on where it stopped\n"
    assert capsys.readouterr().err == said


def test_slice_and_inspect_show_the_true_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = save_tiny(tmp_path / "dense", tiny_config(), torch.float32)
    assert main(small(dense, tmp_path / "out", "--fraction", "0.3", "--dtype", "bfloat16")) == 0
    printed = capsys.readouterr().out
    assert "64 at 7 places of the residual stream" in printed
    assert "6 of rank 8" in printed
    assert main(["inspect", str(tmp_path / "out")]) == 0
    inspected = capsys.readouterr().out
    assert printed.startswith(inspected)
    took, memory = printed.removeprefix(inspected).splitlines()
    assert "eigenvectors" in took
    assert "signals in memory of cpu" in memory
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert fields["dtype"] == "bfloat16"
    assert fields["ratio"] == fields["sliced_parameters"] / fields["dense_parameters"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["tiny", "tiny_sliced"])
def test_perplexity_agrees_with_transformers(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory: Path = request.getfixturevalue(kind)
    text = tmp_path / "text.txt"
    text.write_text("Some text of a few hundred bytes, repeated with care. " * 12)
    command = ["perplexity", str(directory), "--text", str(text), "--json"]
    assert main([*command, "--sequence-length", "100", "--samples", "3"]) == 0
    result = json.loads(capsys.readouterr().out)
    ids = AutoTokenizer.from_pretrained(directory)(text.read_text())["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    windows = torch.tensor(ids[:300]).reshape(3, 100)
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss
    assert result["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)
    assert result["predicted_tokens"] == 3 * 99


def test_a_reader_that_leaves_is_no_error(tiny_sliced: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "inspect", str(tiny_sliced)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait() == 128 + signal.SIGPIPE


def test_perplexity_through_vllm_is_the_same(
    tiny_sliced: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some text of a few hundred bytes, repeated with care. " * 12)
    command = ["perplexity", str(tiny_sliced), "--text", str(text), "--sequence-length", "100"]
    assert main([*command, "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)

    # On the cores that vLLM chooses, as where nobody has said anything.
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)

    def run_in_vllm(gibibytes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *command, "--json", "--backend", "vllm"],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": gibibytes, "VLLM_NO_USAGE_STATS": "1"},
        )

    result = run_in_vllm("1000000")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"sliceserve: error: vLLM cannot load '{tiny_sliced}': ")
    assert "memory" in last.lower()
    result = run_in_vllm("1")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == expected | {
        "backend": "vllm",
        "perplexity": pytest.approx(expected["perplexity"], rel=1e-3),
    }
