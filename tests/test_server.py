"""`sliceserve serve` as its users meet it: a real process, the openai client, real requests."""

import json
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import promql_parser
import pytest
from helm_render import (
    CHART,
    GPU_SERIES,
    board_expressions,
    of_kind,
    render,
    rule_expressions,
    scenario,
    series_of,
)
from prometheus_client.parser import text_string_to_metric_families
from real_prometheus import answer_of, answers_to_the_board, scraping
from server_process import STOP_SECONDS, serving, wait_until_gone
from test_rules import PROMTOOL, needs_promtool
from transformers import AutoTokenizer

from sliceserve.slicing.checkpoint import read_checkpoint_summary

MAX_MODEL_LEN = 512

PROMPT = "The capital of France is"
MESSAGES: list[Any] = [{"role": "user", "content": "Name three colours."}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}

# A sample's name and labels, to its value.
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@dataclass(frozen=True)
class Server:
    directory: Path
    url: str

    @property
    def model(self) -> str:
        return self.directory.name

    def get(self, path: str) -> tuple[int, str]:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as response:
            return response.status, response.read().decode()

    def samples(self) -> Samples:
        families = text_string_to_metric_families(self.get("/metrics")[1])
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        }

    def ours(self, **labels: str) -> dict[str, float]:
        """Our samples with exactly these labels beside the model's name, by short name."""
        wanted = tuple(sorted({"model_name": self.model, **labels}.items()))
        return {
            name.removeprefix("sliceserve_"): value
            for (name, found), value in self.samples().items()
            if name.startswith("sliceserve_") and found == wanted
        }

    def ours_after(self, requests: float) -> dict[str, float]:
        """Our samples once this many requests are counted, which may follow their answers."""
        deadline = time.monotonic() + 10
        while (samples := self.ours())["request_latency_seconds_count"] < requests:
            assert time.monotonic() < deadline, f"{requests} requests are not counted: {samples}"
            time.sleep(0.05)
        return samples


@pytest.fixture(scope="module")
def server(sliced_smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server process; stopping it must leave no process and the exit code 0."""
    log = tmp_path_factory.mktemp("server") / "log"
    options = ("--max-model-len", str(MAX_MODEL_LEN))
    with serving(sliced_smollm2, log, *options) as started:
        started.wait_for("/health", 200)
        yield Server(sliced_smollm2, started.url)
        started.process.terminate()
        assert started.process.wait(STOP_SECONDS) == 0, log.read_text()
        wait_until_gone(started.process.pid)


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def tokenizer(server: Server) -> Any:
    return AutoTokenizer.from_pretrained(server.directory)


def error_of(caught: pytest.ExceptionInfo[openai.APIStatusError]) -> dict[str, Any]:
    """The OpenAI error object of a refused request."""
    error: dict[str, Any] = caught.value.response.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    assert error["code"] == caught.value.status_code
    assert error["message"]
    return error


def test_model_is_listed_under_its_directory_name(server: Server, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [server.model]


def test_health(server: Server) -> None:
    assert server.get("/health")[0] == 200


def test_completion_usage_agrees_with_the_tokenizer(
    server: Server, client: openai.OpenAI, tokenizer: Any
) -> None:
    answer = client.completions.create(
        model=server.model,
        prompt=PROMPT,
        temperature=0,
        max_tokens=8,
        extra_body={"ignore_eos": True},
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text
    assert answer.usage
    assert answer.usage.prompt_tokens == len(tokenizer(PROMPT)["input_ids"])
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_chat_uses_the_checkpoint_template(
    server: Server, client: openai.OpenAI, tokenizer: Any
) -> None:
    answer = client.chat.completions.create(model=server.model, messages=MESSAGES, **GREEDY)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert answer.usage
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert answer.usage.prompt_tokens == len(expected)


def test_streamed_chat_equals_the_whole_answer(server: Server, client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=server.model, messages=MESSAGES, **GREEDY)
    stream = client.chat.completions.create(
        model=server.model,
        messages=MESSAGES,
        stream=True,
        stream_options={"include_usage": True},
        **GREEDY,
    )
    *chunks, last = stream
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(deltas) == whole.choices[0].message.content
    assert sum(map(bool, deltas)) > 1
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == []
    assert last.usage
    assert whole.usage
    assert last.usage.total_tokens == whole.usage.total_tokens


def test_stop_string_ends_the_answer_before_itself(server: Server, client: openai.OpenAI) -> None:
    whole = client.completions.create(model=server.model, prompt=PROMPT, **GREEDY)
    text = whole.choices[0].text
    stop = text[len(text) // 2 :][:3]
    stopped = client.completions.create(model=server.model, prompt=PROMPT, stop=stop, **GREEDY)
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_completion_logprobs(server: Server, client: openai.OpenAI) -> None:
    answer = client.completions.create(model=server.model, prompt=PROMPT, logprobs=3, **GREEDY)
    logprobs = answer.choices[0].logprobs
    assert logprobs
    assert answer.usage
    assert logprobs.tokens
    assert logprobs.token_logprobs
    assert logprobs.top_logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert len(logprobs.token_logprobs) == answer.usage.completion_tokens
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen == max(top.values()) <= 0


def test_chat_logprobs(server: Server, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=server.model, messages=MESSAGES, logprobs=True, top_logprobs=2, **GREEDY
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs
    assert logprobs.content
    for token in logprobs.content:
        assert len(token.top_logprobs) == 2
        assert token.logprob == max(top.logprob for top in token.top_logprobs) <= 0


def test_two_choices_count_the_prompt_once(
    server: Server, client: openai.OpenAI, tokenizer: Any
) -> None:
    answer = client.completions.create(
        model=server.model,
        prompt=PROMPT,
        n=2,
        seed=1,
        max_tokens=5,
        extra_body={"ignore_eos": True},
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage
    assert answer.usage.prompt_tokens == len(tokenizer(PROMPT)["input_ids"])
    assert answer.usage.completion_tokens == 10


def test_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="no-such-model", prompt=PROMPT)
    assert "no-such-model" in error_of(caught)["message"]


def test_bad_body_is_a_bad_request(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(
            model=server.model, prompt=PROMPT, extra_body={"max_tokens": "many"}
        )
    assert "max_tokens" in json.dumps(error_of(caught))


def test_too_long_prompt_is_a_bad_request(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=server.model, prompt="word " * (2 * MAX_MODEL_LEN))
    assert str(MAX_MODEL_LEN) in error_of(caught)["message"]


def test_metrics_show_vllm_series_and_ours(server: Server) -> None:
    names = {name for name, _ in server.samples()}
    assert "vllm:num_requests_running" in names
    ours = """
        gpus gpu_seconds_total parameters ready running_requests queued_prompt_tokens
        rejected_total refused_heads_total drained_requests_total
        request_latency_seconds_bucket queue_time_seconds_bucket time_to_first_token_seconds_bucket
        time_per_output_token_seconds_bucket prompt_tokens_total generation_tokens_total
    """
    assert names >= {f"sliceserve_{name}" for name in ours.split()}
    assert not names & GPU_SERIES


# What our names say that they count, before `_total`, and all labels that ours may have.
UNITS = r".*_(seconds|bytes|ratio|tokens|requests|responses|heads)|gpus|parameters|rejected|ready"
LABELS = {"model_name", "form", "gpu", "le", "outcome", "reason", "route", "status"}


def own_metrics(server: Server) -> str:
    """What `/metrics` shows of our families, but for the client library's times of creation."""
    server.get("/v1/models")  # requests are counted from the first on
    lines = re.findall(r"^(?:# \w+ )?sliceserve_.*\n", server.get("/metrics")[1], re.MULTILINE)
    return "".join(line for line in lines if not re.search(r"sliceserve_\w+_created\b", line))


def test_our_series_are_named_as_is_usual(server: Server) -> None:
    text = own_metrics(server)
    # By the lines themselves: the parser gives a counter's samples the ending if they lack it.
    types = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))
    assert set(types.values()) == {"counter", "gauge", "histogram"}
    for name, kind in types.items():
        assert (kind == "counter") == name.endswith("_total"), name
    families = list(text_string_to_metric_families(text))
    assert len(families) == len(types)
    for family in families:
        assert family.documentation, family.name
        assert re.fullmatch(UNITS, family.name.removeprefix("sliceserve_")), family.name
        for sample in family.samples:
            assert {"model_name"} <= sample.labels.keys() <= LABELS, sample


@needs_promtool
def test_promtool_finds_nothing_wrong_with_our_series(server: Server) -> None:
    command, text = [str(PROMTOOL), "check", "metrics"], own_metrics(server)
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


def test_metrics_tell_the_model_and_its_devices(server: Server) -> None:
    summary = read_checkpoint_summary(server.directory)
    assert server.ours()["gpus"] == server.ours()["gpu_seconds_total"] == 0
    assert server.ours(form="dense")["parameters"] == summary.dense_parameters
    assert server.ours(form="sliced")["parameters"] == summary.sliced_parameters


@pytest.mark.parametrize("tokens", [1, 6])
def test_metrics_count_a_request_exactly(
    server: Server, client: openai.OpenAI, tokens: int
) -> None:
    warm = server.ours()["request_latency_seconds_count"]
    client.completions.create(model=server.model, prompt=PROMPT, max_tokens=1)
    before = server.ours_after(warm + 1)
    started = time.monotonic()
    answer = client.completions.create(
        model=server.model, prompt=PROMPT, max_tokens=tokens, extra_body={"ignore_eos": True}
    )
    elapsed = time.monotonic() - started
    after = server.ours_after(warm + 2)
    assert answer.usage
    gained = {name: after[name] - before[name] for name in after}
    assert gained["prompt_tokens_total"] == answer.usage.prompt_tokens
    assert gained["generation_tokens_total"] == answer.usage.completion_tokens == tokens
    assert gained["request_latency_seconds_count"] == 1
    assert gained["queue_time_seconds_count"] == gained["time_to_first_token_seconds_count"] == 1
    assert gained["time_per_output_token_seconds_count"] == (1 if tokens > 1 else 0)
    queued, first, latency = (
        gained[f"{name}_seconds_sum"]
        for name in ("queue_time", "time_to_first_token", "request_latency")
    )
    assert 0 < queued < first <= latency <= elapsed


def test_the_chart_asks_for_series_that_the_server_exports(server: Server) -> None:
    """Those of the alert rules, the autoscaler and the board; `up` is Prometheus' own."""
    values = scenario(CHART / "ci" / "full-values.yaml")
    manifests = render(values)
    (rule,) = of_kind(manifests, "PrometheusRule")
    recorded = {r["record"] for g in rule["spec"]["groups"] for r in g["rules"] if "record" in r}
    (scaled,) = of_kind(manifests, "ScaledObject")
    query = scaled["spec"]["triggers"][0]["metadata"]["query"]
    expressions = [*rule_expressions(values), promql_parser.parse(query), *board_expressions()]
    wanted = set[str]().union(*map(series_of, expressions))
    assert recorded | {"up"} < wanted
    server.get("/v1/models")  # requests are counted from the first on
    labels: dict[str, set[str]] = {}
    for name, found in server.samples():
        labels.setdefault(name, set()).update(label for label, _ in found)
    for name in sorted(wanted - recorded - GPU_SERIES - {"up"}):
        assert name in labels, name
        assert "model_name" in labels[name]


@pytest.fixture
def prometheus(server: Server, tmp_path: Path) -> Iterator[httpx.Client]:
    """A real Prometheus that scrapes the server and has the chart's rules."""
    values = scenario(CHART / "ci" / "full-values.yaml")
    values["model"]["servedName"] = server.model
    (rule,) = of_kind(render(values), "PrometheusRule")
    with scraping(server.url.removeprefix("http://"), rule["spec"], tmp_path) as api:
        yield api


def test_a_real_prometheus_evaluates_the_charts_rules(
    server: Server, client: openai.OpenAI, prometheus: httpx.Client
) -> None:
    def result(query: str) -> Any:
        found = answer_of(prometheus, "/query", lambda data: data["result"], query=query)
        return float(found["result"][0]["value"][1])

    assert result("up == 1") == 1
    before = result("sliceserve_generation_tokens_total")
    client.completions.create(model=server.model, prompt=PROMPT, **GREEDY)
    # A scrape may come while they are being written.
    after = before + GREEDY["max_tokens"]
    assert result(f"sliceserve_generation_tokens_total >= {after}") == after
    # No GPUs here, and tokens written.
    assert result("sliceserve:gpu_ms_per_token >= 0") == 0
    groups = answer_of(
        prometheus, "/rules", lambda data: all(r["health"] == "ok" for r in rules_of(data))
    )
    assert {rule["name"] for rule in rules_of(groups)} >= {
        "SliceserveErrors",
        "SliceserveCacheFull",
    }
    assert [rule["name"] for rule in rules_of(groups) if rule.get("state") == "firing"] == []


def test_a_real_prometheus_answers_every_query_of_the_board(
    server: Server, client: openai.OpenAI, prometheus: httpx.Client
) -> None:
    """With numbers, but of GPUs, of which there are none here."""
    answer_of(prometheus, "/query", lambda data: data["result"], query="up == 1")
    client.completions.create(model=server.model, prompt=PROMPT, **GREEDY)
    asked = answers_to_the_board(prometheus, namespace="llm", model=server.model, instance=".*")
    assert asked == len(board_expressions())


def rules_of(data: Any) -> list[dict[str, Any]]:
    return [rule for group in data["groups"] for rule in group["rules"]]
