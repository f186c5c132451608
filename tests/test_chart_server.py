"""The chart's pods run here: the server's rendered command, its probes, the pod of `helm test`.

And Prometheus, as the chart and the compose file have it scrape that server.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import promql_parser
import pytest
from browser import needs_chromium, opened
from helm_render import (
    CHART,
    Manifest,
    adapter_rule,
    asked_now,
    board,
    board_expressions,
    of_kind,
    render,
    rule_expressions,
    scenario,
    selectors_of,
    with_values,
)
from playwright.sync_api import expect
from real_prometheus import LABELS, answer_of, answers_to_the_board, filled_in, scraping
from safetensors.torch import load_file
from server_process import ServerProcess, post, reserved_port, started

KEY = "key-of-alice"
BIN = Path(sys.executable).parent


def moved(words: list[str], places: dict[str, str]) -> list[str]:
    """A command with the container's paths and addresses replaced by those here."""
    for before, after in places.items():
        words = [word.replace(before, after) for word in words]
    return words


def environment(container: Manifest, places: dict[str, str]) -> dict[str, str]:
    values = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    return dict(zip(values, moved(list(values.values()), places), strict=True))


@pytest.fixture(scope="module")
def values() -> Iterator[dict[str, Any]]:
    found = scenario(CHART / "ci" / "cpu-values.yaml")
    found["model"]["servedName"] = "small"
    with reserved_port() as port:
        found["server"] |= {"port": port, "maxModelLen": 256}
        yield found | {
            "auth": {"existingSecret": "keys"},
            "autoscaling": {"kind": "keda", "prometheusAddress": "http://prometheus:9090"},
            "checkpoints": {"accessMode": "ReadWriteMany"},
            "monitoring": {"monitor": "service", "rules": {"enabled": True}},
        }


@pytest.fixture(scope="module")
def manifests(values: dict[str, Any]) -> list[Manifest]:
    return render(values)


@pytest.fixture(scope="module")
def container(manifests: list[Manifest]) -> Manifest:
    (deployment,) = of_kind(manifests, "Deployment")
    (found,) = deployment["spec"]["template"]["spec"]["containers"]
    return dict(found)


@pytest.fixture(scope="module")
def server(
    container: Manifest, tiny_sliced: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    work = tmp_path_factory.mktemp("pod")
    (work / "api-key").write_text(f"{KEY}\n")
    _, _, directory = container["command"]
    places = {
        directory: str(tiny_sliced),
        "/etc/sliceserve/key": str(work),
        "/cache": str(work / "cache"),
        "0.0.0.0": "127.0.0.1",
    }
    command = moved(container["command"] + container["args"], places)
    command[0] = str(BIN / command[0])
    port: int = container["ports"][0]["containerPort"]
    variables = environment(container, places)
    with started([*command, "--enforce-eager"], port, work / "log", variables) as running:
        yield running


@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe", "livenessProbe"])
def test_probes_find_the_rendered_server(
    probe: str, container: Manifest, server: ServerProcess
) -> None:
    """Without a key, as the kubelet asks."""
    request = container[probe]["httpGet"]
    assert request["port"] == container["ports"][0]["name"]
    assert server.wait_for(request["path"], 200).status_code == 200


def test_the_rendered_server_wants_the_key_of_the_secret(server: ServerProcess) -> None:
    server.wait_for("/readyz", 200)
    assert httpx.get(f"{server.url}/v1/models", timeout=60).status_code == 401
    known: dict[str, Any] = httpx.get(
        f"{server.url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}, timeout=60
    ).json()
    (model,) = known["data"]
    assert (model["id"], model["max_model_len"]) == ("small", 256)


def test_the_model_says_what_was_sliced(server: ServerProcess, tiny_sliced: Path) -> None:
    server.wait_for("/readyz", 200)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY)
    (model,) = client.models.list().data
    facts = model.model_dump()["sliceserve"]
    files = map(load_file, tiny_sliced.glob("*.safetensors"))
    stored = [tensor for file in files for tensor in file.values()]
    assert facts["parameters"] == sum(tensor.numel() for tensor in stored)
    # 96 columns became 64; the paper's rotations are whole, two of each of three layers.
    assert (facts["width"], facts["hidden_size"], facts["fraction"]) == (64, 96, 0.3333)
    assert facts["rotations"] == "6 whole matrices"
    assert facts["ratio"] == round(facts["parameters"] / facts["dense_parameters"], 4)
    assert facts["source"] == "dense", "and not where it was"
    assert len(facts["source_sha256"]) == 64


@needs_chromium
def test_a_browser_completes_a_text(server: ServerProcess) -> None:
    """The model has no chat template."""
    server.wait_for("/readyz", 200)
    with opened(f"{server.url}/") as (page, complaints):
        page.get_by_label("API key").fill(KEY)
        page.keyboard.press("Enter")
        page.get_by_label("Text to continue").fill("Once upon a time")
        page.get_by_label("Tokens at most").fill("30")
        with page.expect_response("**/v1/completions") as caught:
            page.get_by_role("button", name="Send").click()
        expect(page.locator("#outcome")).to_contain_text(" in ", timeout=60_000)
        lines = [line for line in caught.value.text().splitlines() if line]
        assert lines.pop() == "data: [DONE]"
        *chunks, last = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert str(last["usage"]["completion_tokens"]) in page.locator("#outcome").inner_text()
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert page.locator("#answer").text_content() == text
        assert complaints == []


def test_the_pod_of_helm_test_asks_it(manifests: list[Manifest], server: ServerProcess) -> None:
    server.wait_for("/readyz", 200)
    (pod,) = of_kind(manifests, "Pod")
    (service,) = of_kind(manifests, "Service")
    (container,) = pod["spec"]["containers"]
    host = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    places = {host: server.url.removeprefix("http://"), "python3": sys.executable}
    words = [word for key in ("command", "args") for word in container.get(key, [])]
    variables = environment(container, places)
    for entry in container["env"]:
        if "valueFrom" in entry:
            assert entry["valueFrom"]["secretKeyRef"] == {"name": "keys", "key": "api-key"}
            variables[entry["name"]] = f"{KEY}\n"
    done = subprocess.run(
        moved(words, places),
        capture_output=True,
        text=True,
        env=os.environ | variables | {"NO_PROXY": "127.0.0.1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def address_of(server: ServerProcess) -> str:
    return server.url.removeprefix("http://")


@pytest.fixture
def prometheus(
    manifests: list[Manifest], container: Manifest, server: ServerProcess, tmp_path: Path
) -> Iterator[httpx.Client]:
    """With the chart's rules, scraping what its ServiceMonitor names; clients have been served."""
    server.wait_for("/readyz", 200)
    (monitor,) = of_kind(manifests, "ServiceMonitor")
    ((port, path),) = ((e["port"], e["path"]) for e in monitor["spec"]["endpoints"])
    assert (port, path) == (container["ports"][0]["name"], "/metrics")
    (rule,) = of_kind(manifests, "PrometheusRule")
    with scraping(address_of(server), rule["spec"], tmp_path) as api:
        assert post(server, KEY, model="small").status_code == 200
        yield api


def series_found(api: httpx.Client, query: str) -> list[Any]:
    """What an instant query finds, as soon as it does."""
    found = answer_of(api, "/query", lambda data: data["result"], query=query)["result"]
    return list(found)


# Labels of which some values have no series until it has happened.
UNTIL_IT_HAPPENS = {'status=~"5.."': "status"}


def test_rules_and_scaler_select_series_that_there_are(
    values: dict[str, Any], manifests: list[Manifest], prometheus: httpx.Client
) -> None:
    """Each selector with all of its matchers, as the release is named and its pods are scraped."""
    (scaled,) = of_kind(manifests, "ScaledObject")
    query = scaled["spec"]["triggers"][0]["metadata"]["query"]
    expressions = [*rule_expressions(values), promql_parser.parse(query)]
    found = [selectors_of(expression) for expression in expressions]
    assert all(found)
    selectors = {asked_now(selector): selector for some in found for selector in some}
    later = set()
    for text, selector in selectors.items():
        for matcher, label in UNTIL_IT_HAPPENS.items():
            if matcher in text:
                later.add(selector.name)
                text = asked_now(selector, without=label)
        assert series_found(prometheus, text)
    assert later == {"sliceserve_http_responses_total"}
    (waiting,) = series_found(prometheus, query)
    assert waiting["value"][1] == "0"


def test_the_pages_rule_for_an_adapter_serves_what_the_scaler_asks_for(
    values: dict[str, Any], prometheus: httpx.Client
) -> None:
    """As prometheus-adapter fills in its template, for the pods that the scaler asks about."""
    (scaler,) = of_kind(
        render(with_values(values, "autoscaling", {"kind": "hpa"})), "HorizontalPodAutoscaler"
    )
    asked = scaler["spec"]["metrics"][0]["pods"]["metric"]
    rule = adapter_rule()
    (discovered,) = answer_of(prometheus, "/series", bool, **{"match[]": rule["seriesQuery"]})
    of_kubernetes = {label: discovered[label] for label in rule["resources"]["overrides"]}
    assert of_kubernetes == LABELS
    matchers = of_kubernetes | asked["selector"]["matchLabels"]
    query = rule["metricsQuery"]
    for name, value in {
        "Series": discovered["__name__"],
        "LabelMatchers": ",".join(f'{label}="{value}"' for label, value in matchers.items()),
        "GroupBy": "pod",
    }.items():
        query = query.replace(f"<<.{name}>>", value)
    (waiting,) = series_found(prometheus, query)
    assert waiting["metric"] == {"pod": LABELS["pod"]}
    assert waiting["value"][1] == "0"
    assert rule["name"]["as"] == asked["name"]


def test_the_board_wants_no_label_of_kubernetes(server: ServerProcess, tmp_path: Path) -> None:
    """Compose's Prometheus gives none: no namespace is offered, and "All" are those without one."""
    server.wait_for("/readyz", 200)
    variables = {one["name"]: one for one in board()["templating"]["list"] if "allValue" in one}
    chosen: dict[str, str] = {}
    offered: dict[str, list[str]] = {}
    with scraping(address_of(server), {"groups": []}, tmp_path, labels={}) as api:
        assert series_found(api, "up == 1")
        assert post(server, KEY, model="small").status_code == 200
        for name, variable in variables.items():
            asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert asked
            series = filled_in(asked[1], **chosen)
            assert series_found(api, series)
            found = api.get(f"/label/{asked[2]}/values", params={"match[]": series})
            offered[name] = found.json()["data"]
            assert variable["includeAll"]
            assert variable["current"]["value"] == "$__all"
            chosen[name] = variable["allValue"]
        assert offered == {"namespace": [], "model": ["small"], "instance": [address_of(server)]}
        assert answers_to_the_board(api, **chosen) == len(board_expressions())
