"""A real server that gives requests little time and keys few tokens, traced, until it is killed."""

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest
from otlp_collector import Collector, collecting
from server_process import (
    ServerProcess,
    ends_with_its_engine,
    post,
    sample,
    serving,
    stopped,
    stream,
)

FIXED_KEY, OTHER_KEY = "key-from-environment", "key-of-bob"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def hurried(
    tiny_sliced: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server that gives requests little time and keys few tokens, its access log a full disk."""
    log = tmp_path_factory.mktemp("hurried") / "log"
    options = ["--request-timeout", "10", "--key-tokens-per-minute", "100", "--metrics-public"]
    options += ["--access-log", "/dev/full", "--otlp-traces-endpoint", collector.url]
    environment = {
        "SLICESERVE_API_KEY": f"{FIXED_KEY},{OTHER_KEY}",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    with serving(tiny_sliced, log, *options, **environment) as server:
        server.wait_for("/readyz", 200)
        yield server


def test_a_key_has_its_tokens_a_minute(hurried: ServerProcess) -> None:
    first = post(hurried, OTHER_KEY, n=50, max_tokens=2)
    assert first.json()["usage"]["completion_tokens"] == 100
    refused = post(hurried, OTHER_KEY)
    assert refused.status_code == 429
    assert "100 tokens a minute" in refused.json()["error"]["message"]
    assert post(hurried, FIXED_KEY).status_code == 200


def test_a_trace_leads_from_the_client_to_the_engine(
    hurried: ServerProcess, collector: Collector
) -> None:
    trace, client = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    answer = httpx.post(
        f"{hurried.url}/v1/completions",
        json={"model": "sliced", "prompt": "hi", "max_tokens": 3},
        headers={
            "Authorization": f"Bearer {FIXED_KEY}",
            "traceparent": f"00-{trace}-{client}-01",
            "X-Request-ID": "traced",
        },
        timeout=60,
    )
    assert answer.status_code == 200
    ours = collector.wait_for(lambda span: span.parent_span_id == bytes.fromhex(client))
    theirs = collector.wait_for(lambda span: span.parent_span_id == ours.span_id)
    assert {ours.trace_id, theirs.trace_id} == {bytes.fromhex(trace)}
    assert ours.name == "POST /v1/completions"
    values = {pair.key: pair.value for pair in ours.attributes}
    assert values["http.response.status_code"].int_value == 200
    assert values["sliceserve.request.id"].string_value == "traced"
    assert "gen_ai.usage.completion_tokens" in {pair.key for pair in theirs.attributes}


def test_no_span_has_a_key(hurried: ServerProcess, collector: Collector) -> None:
    """Of what was answered and of what was refused, ours and vLLM's."""

    def has(status: int) -> Callable[[Any], bool]:
        return lambda span: any(
            pair.key == "http.response.status_code" and pair.value.int_value == status
            for pair in span.attributes
        )

    for key, status in ((FIXED_KEY, 200), ("guessed", 401)):
        assert post(hurried, key, max_tokens=1).status_code == status
        parent = collector.wait_for(has(status))
        assert parent.name == "POST /v1/completions"
    collector.wait_for(lambda span: span.name == "llm_request")
    for span in collector.spans:
        for key in (FIXED_KEY, OTHER_KEY, "guessed"):
            assert key.encode() not in span.SerializeToString(), span.name


def test_what_takes_too_long_ends_and_frees_the_engine(hurried: ServerProcess) -> None:
    with stopped(hurried.engine()), ThreadPoolExecutor(1) as pool:
        whole = pool.submit(post, hurried, FIXED_KEY, max_tokens=500)
        with stream(hurried, FIXED_KEY, tokens=500) as answer:
            assert answer.status_code == 200
            events = [line for line in answer.iter_lines() if line]
        late = whole.result()
    assert late.status_code == 408
    assert "within 10 s" in late.json()["error"]["message"]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == 408
    assert post(hurried, FIXED_KEY, max_tokens=1).status_code == 200
    assert not sample(hurried, "vllm:num_requests_running")


def test_a_full_disk_for_all_logs_disturbs_no_request(hurried: ServerProcess) -> None:
    def is_logged_by_vllm() -> None:
        unknown = httpx.post(
            f"{hurried.url}/v1/responses",
            json={"model": "other", "input": "hi"},
            headers={"Authorization": f"Bearer {FIXED_KEY}"},
            timeout=60,
        )
        assert unknown.status_code == 404

    before = hurried.log.stat().st_size
    is_logged_by_vllm()
    size = hurried.log.stat().st_size
    assert size > before
    for process in (hurried.process.pid, hurried.engine()):
        # Stands in for the disk: writing more fails there too, with another error.
        resource.prlimit(process, resource.RLIMIT_FSIZE, (size, size))
    size = hurried.log.stat().st_size  # what one of them wrote before it had its limit
    is_logged_by_vllm()
    assert post(hurried, FIXED_KEY).status_code == 200
    assert hurried.wait_for("/livez", 200)
    assert hurried.log.stat().st_size == size


def test_a_killed_engine_ends_streams_and_the_server(hurried: ServerProcess) -> None:
    os.kill(hurried.engine(), signal.SIGSTOP)
    with closing(HTTPConnection(hurried.url.removeprefix("http://"), timeout=60)) as probe:
        probe.request("GET", "/livez")  # before the end, as the server may be gone soon after it
        ends_with_its_engine(hurried, FIXED_KEY, lambda engine: os.kill(engine, signal.SIGKILL))
        assert probe.getresponse().status == 503
    assert hurried.log.read_text().count("The access log loses lines") == 1
