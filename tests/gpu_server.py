"""On a machine with a GPU: what the server says of it, and a real lack of its memory.

    python tests/gpu_server.py DIR

Not collected by pytest, which must pass without a GPU. DIR is a sliced checkpoint whose model reads
prompts of 8000 tokens. What `/metrics` tells of the GPU is compared with nvidia-smi. Then this
process takes the memory that the server has left, and asks for the logprobs of a long prompt, which
need some: the client must get an OpenAI error of a 5xx, `/livez` fail, and the server end with 1.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import torch
from server_process import ServerProcess, post, reserved_port, sample, scraped_to_its_end, started

KEY = "a-key"
LONG, LEFT_FREE = 8000, 64 * 2**20
MIB = 2**20


def nvidia_smi() -> list[float]:
    """Bytes used and in all of the first GPU that is visible, and its utilisation."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = "--query-gpu=memory.used,memory.total,utilization.gpu"
    run = subprocess.run(
        ["nvidia-smi", "-i", gpu, query, "--format=csv,noheader,nounits"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    used, total, busy = map(float, run.stdout.split(","))
    return [used * MIB, total * MIB, busy / 100]


def tells_of_the_gpu(server: ServerProcess) -> None:
    """Compare the series with nvidia-smi, while the GPU works."""
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(post, server, KEY, max_tokens=1500) for _ in range(8)]
        time.sleep(3)
        while sample(server, "sliceserve_gpu_utilization_ratio", KEY) == 0:
            assert not all(answer.done() for answer in answers), "never any utilisation"
            time.sleep(0.5)
        names = ["memory_used_bytes", "memory_total_bytes", "utilization_ratio"]
        told = [sample(server, f"sliceserve_gpu_{name}", KEY) for name in names]
        seen = nvidia_smi()
    assert [answer.result().status_code for answer in answers] == [200] * 8
    print(f"{names}: /metrics {told}, nvidia-smi {seen}", flush=True)
    assert abs(told[0] - seen[0]) < 0.02 * seen[1]
    assert abs(told[1] - seen[1]) < 2 * MIB
    assert 0 < told[2] <= 1
    assert sample(server, "sliceserve_gpus", KEY) == 1
    # Counted up to the moment of each scrape; the two lie apart as follows.
    begun = time.monotonic()
    before = sample(server, "sliceserve_gpu_seconds_total", KEY)
    time.sleep(least := 2)
    spent = sample(server, "sliceserve_gpu_seconds_total", KEY) - before
    most = time.monotonic() - begun
    print(f"GPU-seconds in {least} to {most:.2f} s: {spent:.2f}", flush=True)
    assert least <= spent <= most


def runs_out_of_memory(server: ServerProcess) -> None:
    """Leave no memory, and ask for what needs some."""
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free - LEFT_FREE, dtype=torch.uint8, device="cuda")
    print(f"took {taken.numel() / 2**30:.1f} GiB", flush=True)
    prompt = [1000 + place for place in range(LONG)]
    with ThreadPoolExecutor(2) as pool:
        answers = list(
            pool.map(
                lambda logprobs: post(server, KEY, prompt=prompt, prompt_logprobs=logprobs), [1, 1]
            )
        )
    for answer in answers:
        print(answer.status_code, answer.text[:300], flush=True)
        assert 500 <= answer.status_code < 600
        assert answer.json()["error"]["message"]
        assert "Traceback" not in answer.text
    with suppress(httpx.TransportError):  # it may have ended meanwhile
        assert httpx.get(f"{server.url}/livez", timeout=30).status_code == 503
    assert scraped_to_its_end(server, KEY) == 1
    log = server.log.read_text()
    assert "out of memory" in log
    print("\n".join(line for line in log.splitlines() if "out of memory" in line)[-600:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, metavar="DIR")
    options = parser.parse_args()
    command = [
        sys.executable, "-m", "sliceserve.slicing.cli", "serve", str(options.directory),
        "--served-model-name", "sliced", "--dtype", "bfloat16", "--enforce-eager",
        "--gpu-memory-utilization", "0.3", "--max-num-batched-tokens", "8192",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as work, reserved_port() as port:
        command += ["--port", str(port)]
        log = Path(work) / "log"
        with started(command, port, log, {"SLICESERVE_API_KEY": KEY}) as server:
            try:
                server.wait_for("/readyz", httpx.codes.OK)
                tells_of_the_gpu(server)
                runs_out_of_memory(server)
            except BaseException:
                print(log.read_text()[-5000:], file=sys.stderr)
                raise
    print("as it should be")
    return 0


if __name__ == "__main__":
    sys.exit(main())
