"""The chart's alert rules: parsed, and tried on series that must fire them and that must not."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_render import (
    FULL,
    NODES,
    of_kind,
    render,
    rule_expressions,
    selectors_of,
    with_values,
)
from programs import needs

GROUP = with_values(NODES, "monitoring.rules.enabled", True)
PROMTOOL = shutil.which("promtool", path=str(Path(sys.executable).parent))
POD = 'namespace="llm",pod="demo-sliceserve-5d9c7b-x2x4z"'
MODEL = f'{POD},model_name="llama-2-70b"'
RESPONSES = "sliceserve_http_responses_total"
BUCKET = "sliceserve_time_to_first_token_seconds_bucket"

needs_promtool = needs(PROMTOOL, "no promtool: apt gave no prometheus package to `make install`")

UP = f"up{{{POD}}}"
READY = f"sliceserve_ready{{{MODEL}}}"
SECOND_READY, OTHERS_READY = (
    READY.replace(POD, f'namespace="llm",pod="{pod}"')
    for pod in ("demo-sliceserve-5d9c7b-9rr5k", "another-5d9c7b-x2x4z")
)
# Another release of the same model in the same namespace.
RELEASES = ("demo", "other")
OTHERS_POD = POD.replace("demo", "other")
# Of another release: a series, so that there is a time at which to ask.
ANOTHER = {'up{namespace="llm",pod="another-5d9c7b-x2x4z"}': "1x2000"}

# For every alert: series on which it fires after 45 minutes, and such as keep it quiet.
CASES: dict[str, tuple[dict[str, str], ...]] = {
    "SliceserveTargetDown": (
        {UP: "1x10 0x2000"},
        {UP: "1x2000"},
        # Still loading.
        {UP: "0x2000"},
    ),
    # A pod that is gone has no series.
    "SliceserveNoReplicaUp": (
        {UP: "1x38 0x2", **ANOTHER},
        {UP: "1x2000"},
        {UP: "0x2000"},
        {UP: "1x44 0x2000"},
        ANOTHER,
    ),
    "SliceserveNoReplicaReady": (
        # Full, and of another release is no help.
        {UP: "1x2000", READY: "1x30 0x2000", OTHERS_READY: "1x2000"},
        {UP: "1x2000", READY: "1x2000"},
        # One of two is full.
        {READY: "0x2000", SECOND_READY: "1x2000"},
        # For a moment, or a rollout's drain.
        {UP: "1x2000", READY: "1x40 0x2000"},
        # Full, and then gone: that is the alert above.
        {UP: "1x38 0x2", READY: "0x38 _x2", **ANOTHER},
    ),
    "SliceserveNoReplicaYet": (
        {UP: "0x2000"},
        {UP: "0x30 1x2000"},
        # That is the other alert's.
        {UP: "1x2 0x2000"},
    ),
    "SliceserveErrors": (
        {
            f'{RESPONSES}{{{MODEL},route="/v1/completions",status="503"}}': "0+6x2000",
            f'{RESPONSES}{{{MODEL},route="/v1/completions",status="200"}}': "0+60x2000",
            # Probes, scrapes and an open status page do not dilute it.
            f'{RESPONSES}{{{MODEL},route="/metrics",status="200"}}': "0+6000x2000",
            f'{RESPONSES}{{{MODEL},route="/status.json",status="200"}}': "0+6000x2000",
        },
        {
            f'{RESPONSES}{{{MODEL},route="/v1/completions",status="503"}}': "0+1x2000",
            f'{RESPONSES}{{{MODEL},route="/v1/completions",status="200"}}': "0+60x2000",
            f'{RESPONSES}{{{MODEL},route="/readyz",status="503"}}': "0+6000x2000",
            f'{RESPONSES}{{{MODEL},route="/status.json",status="503"}}': "0+6000x2000",
        },
    ),
    "SliceserveSlowFirstToken": (
        {
            f'{BUCKET}{{{MODEL},le="1.0"}}': "0+98x2000",
            f'{BUCKET}{{{MODEL},le="7.5"}}': "0+98x2000",
            f'{BUCKET}{{{MODEL},le="10.0"}}': "0+100x2000",
            f'{BUCKET}{{{MODEL},le="+Inf"}}': "0+100x2000",
        },
        {
            f'{BUCKET}{{{MODEL},le="1.0"}}': "0+100x2000",
            f'{BUCKET}{{{MODEL},le="7.5"}}': "0+100x2000",
            f'{BUCKET}{{{MODEL},le="+Inf"}}': "0+100x2000",
        },
    ),
    "SliceserveQueueGrows": (
        {f"vllm:num_requests_waiting{{{MODEL}}}": "0+2x2000"},
        {f"vllm:num_requests_waiting{{{MODEL}}}": "2000-1x1900"},
        # Grows, and is short.
        {f"vllm:num_requests_waiting{{{MODEL}}}": "0+0.001x2000"},
    ),
    "SliceserveCacheFull": (
        {f"vllm:kv_cache_usage_perc{{{MODEL}}}": "0.99x2000"},
        {f"vllm:kv_cache_usage_perc{{{MODEL}}}": "0.9x2000"},
    ),
    "SliceservePreemptions": (
        {f"vllm:num_preemptions_total{{{MODEL}}}": "0+120x2000"},
        {f"vllm:num_preemptions_total{{{MODEL}}}": "0+30x2000"},
    ),
    # A day at 600 tokens a minute, then at 300; requests wait, or do not.
    "SliceserveGpuTimeRegression": (
        {
            f"sliceserve_gpu_seconds_total{{{MODEL}}}": "0+480x2000",
            f"sliceserve_generation_tokens_total{{{MODEL}}}": "0+600x1440 864000+300x560",
            # A queue that flickers.
            f"vllm:num_requests_waiting{{{MODEL}}}": "3 0 0 " * 600,
        },
        {
            f"sliceserve_gpu_seconds_total{{{MODEL}}}": "0+480x2000",
            f"sliceserve_generation_tokens_total{{{MODEL}}}": "0+600x1440 864000+300x560",
            f"vllm:num_requests_waiting{{{MODEL}}}": "0x2000",
        },
        # Many at once, now and then, between which the GPUs idle.
        {
            f"sliceserve_gpu_seconds_total{{{MODEL}}}": "0+480x2000",
            f"sliceserve_generation_tokens_total{{{MODEL}}}": "0+600x1440 864000+300x560",
            f"vllm:num_requests_waiting{{{MODEL}}}": f"90 {'0 ' * 9}" * 180,
        },
        # Requests wait, and a token costs what it did.
        {
            f"sliceserve_gpu_seconds_total{{{MODEL}}}": "0+480x2000",
            f"sliceserve_generation_tokens_total{{{MODEL}}}": "0+600x2000",
            f"vllm:num_requests_waiting{{{MODEL}}}": "3x2000",
        },
    ),
}
# The regression needs the day before.
LATER = {"SliceserveGpuTimeRegression": "1500m"}
# Names that Kubernetes gives pods of ours, and of others.
DEPLOYMENT_POD = "demo-sliceserve-5d9c7b-x2x4z"
LEADERS = ["demo-sliceserve-group-0", "demo-sliceserve-group-11"]
WORKER = "demo-sliceserve-group-0-1"


def up(pod: str) -> str:
    return f'up{{namespace="llm",pod="{pod}"}}'


def ready(pod: str) -> str:
    return f'sliceserve_ready{{namespace="llm",pod="{pod}",model_name="Llama-2-70b-hf"}}'


FIRST, SECOND = LEADERS
# The same of a group, for alerts on pods: its leaders serve and nothing asks its workers.
GROUP_CASES: dict[str, tuple[dict[str, str], ...]] = {
    "SliceserveTargetDown": (
        {up(FIRST): "1x10 0x2000", up(SECOND): "1x2000"},
        {up(FIRST): "1x2000", up(WORKER): "1x10 0x2000"},
    ),
    "SliceserveNoReplicaUp": (
        {up(FIRST): "1x38 0x2", up(SECOND): "1x20 0x2", up(WORKER): "1x2000"},
        {up(FIRST): "1x38 0x2", up(SECOND): "1x2000"},
    ),
    "SliceserveNoReplicaReady": (
        {ready(FIRST): "1x30 0x2000", ready(SECOND): "0x2000", READY: "1x2000"},
        {ready(FIRST): "1x30 0x2000", ready(SECOND): "1x2000"},
    ),
    "SliceserveNoReplicaYet": (
        {up(FIRST): "0x2000", up(WORKER): "1x2000", UP: "1x2000"},
        {up(FIRST): "0x2000", up(SECOND): "0x30 1x2000"},
    ),
}
GROUP_CASES |= {
    alert: tuple(
        {
            name.replace(DEPLOYMENT_POD, FIRST).replace("llama-2-70b", "Llama-2-70b-hf"): samples
            for name, samples in series.items()
        }
        for series in found
    )
    for alert, found in CASES.items()
    if alert not in GROUP_CASES
}


def rules(values: dict[str, Any] = FULL, release: str = "demo") -> dict[str, Any]:
    (rule,) = of_kind(render(values, release=release), "PrometheusRule")
    spec: dict[str, Any] = rule["spec"]
    return spec


def alerts(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    (group,) = rules(values)["groups"]
    return {rule["alert"]: rule for rule in group["rules"] if "alert" in rule}


def promtool(*arguments: str, directory: Path) -> str:
    assert PROMTOOL is not None
    result = subprocess.run(
        [PROMTOOL, *arguments], cwd=directory, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_every_alert_says_what_to_do() -> None:
    assert alerts(FULL).keys() == CASES.keys()
    for rule in alerts(FULL).values():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"].startswith("demo in llm (llama-2-70b): ")
        assert rule["annotations"]["runbook"]


def test_pods_of_a_group_are_found_by_their_leader() -> None:
    """A group's leader has its number, a worker a second: demo-sliceserve-group-0-1."""
    for values, found in ((FULL, [DEPLOYMENT_POD]), (GROUP, LEADERS)):
        pattern = re.search(r'pod=~"([^"]+)"', alerts(values)["SliceserveTargetDown"]["expr"])
        assert pattern
        assert all(re.fullmatch(pattern[1], pod) for pod in found)
        others = ["demo-sliceserve-slice-5d9c7b1234-x2x4z", "demo-sliceserve-test"]
        assert not any(re.fullmatch(pattern[1], pod) for pod in others)
    # The pattern of the last release, a group's, of the set's own name.
    assert not re.fullmatch(pattern[1], WORKER)
    (group_of_pods,) = of_kind(render(GROUP), "LeaderWorkerSet")
    assert re.fullmatch(pattern[1], f"{group_of_pods['metadata']['name']}-0")


def test_alerts_of_a_group_differ_in_pods_and_model_only() -> None:
    of_group, others = (
        {
            name: re.sub('(pod=~|model_name=)"[^"]+"', "\\1", rule["expr"])
            for name, rule in alerts(values).items()
        }
        for values in (GROUP, FULL)
    )
    assert of_group == others


@pytest.mark.parametrize("values", [FULL, GROUP], ids=["deployment", "group"])
def test_every_rule_is_of_the_releases_pods_only(values: dict[str, Any]) -> None:
    """What is recorded of them has the release's name instead."""
    for expression in rule_expressions(values):
        for selector in selectors_of(expression):
            matched = {matcher.name for matcher in selector.matchers.matchers}
            own = "release" if selector.name.startswith("sliceserve:") else "pod"
            assert {"namespace", own} <= matched, selector


def test_labels_are_strings_whatever_names_there_are() -> None:
    values = with_values(FULL, "model.servedName", "70")
    (group,) = rules(values, release="2026")["groups"]
    ours = {"namespace": "llm", "model_name": "70", "release": "2026"}
    for rule in group["rules"]:
        assert rule["labels"].items() >= ours.items()


def test_every_expression_parses() -> None:
    assert len(rule_expressions(FULL)) == len(CASES) + 1


@needs_promtool
def test_promtool_takes_the_rules(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules()))
    printed = promtool("check", "rules", "rules.yaml", directory=tmp_path)
    assert f"SUCCESS: {len(CASES) + 1} rules found" in printed


def every(cases: dict[str, tuple[dict[str, str], ...]]) -> list[tuple[str, int]]:
    return [(alert, number) for alert, found in cases.items() for number in range(len(found))]


@needs_promtool
@pytest.mark.parametrize(("alert", "number"), every(CASES))
def test_an_alert_fires_when_it_must(alert: str, number: int, tmp_path: Path) -> None:
    """The first case fires, the others are quiet."""
    spec = rules()
    firing = [expected(alert, spec)] if number == 0 else []
    expect_alerts(alert, [spec], CASES[alert][number], firing, tmp_path)


@needs_promtool
@pytest.mark.parametrize(("alert", "number"), every(GROUP_CASES))
def test_an_alert_of_a_group_fires_when_it_must(alert: str, number: int, tmp_path: Path) -> None:
    spec = rules(GROUP)
    firing = [expected(alert, spec, model="Llama-2-70b-hf")] if number == 0 else []
    expect_alerts(alert, [spec], GROUP_CASES[alert][number], firing, tmp_path)


@needs_promtool
@pytest.mark.parametrize("alert", CASES)
def test_releases_of_one_model_have_alerts_of_their_own(alert: str, tmp_path: Path) -> None:
    """Two in trouble are two alerts; of one in trouble the other's rules say nothing."""
    series = CASES[alert][0]
    others = {name.replace(POD, OTHERS_POD): samples for name, samples in series.items()}
    specs = [rules(), rules(release="other")]
    both = [expected(alert, spec, release) for spec, release in zip(specs, RELEASES, strict=True)]
    expect_alerts(alert, specs, series | others, both, tmp_path)
    healthy = f"up{{{OTHERS_POD}}}"
    expect_alerts(alert, specs, {healthy: "1x2000", **series}, both[:1], tmp_path)


@needs_promtool
def test_keda_counts_the_queue_of_its_own_release(tmp_path: Path) -> None:
    series = {f"vllm:num_requests_waiting{{{MODEL}}}": "3x10"}
    series |= {name.replace(POD, OTHERS_POD): "40x10" for name in series}
    asked = {}
    for release, waiting in zip(RELEASES, (3, 40), strict=True):
        (scaled,) = of_kind(render(FULL, release=release), "ScaledObject")
        (trigger,) = scaled["spec"]["triggers"]
        asked[trigger["metadata"]["query"]] = waiting
    queries = [
        {"expr": query, "eval_time": "5m", "exp_samples": [{"labels": "{}", "value": waiting}]}
        for query, waiting in asked.items()
    ]
    run_rules([], series, {"promql_expr_test": queries}, tmp_path)


def expected(
    alert: str, spec: dict[str, Any], release: str = "demo", model: str = "llama-2-70b"
) -> dict[str, Any]:
    """An alert as it must reach Alertmanager: of which release, and of one pod also of which."""
    (rule,) = [
        one for group in spec["groups"] for one in group["rules"] if one.get("alert") == alert
    ]
    labels = {"namespace": "llm", "model_name": model, "release": release}
    if alert == "SliceserveTargetDown":
        pod = FIRST if model == "Llama-2-70b-hf" else DEPLOYMENT_POD.replace("demo", release)
        labels["pod"] = pod
    return {
        "exp_labels": labels | {"severity": rule["labels"]["severity"]},
        "exp_annotations": rule["annotations"],
    }


def expect_alerts(
    alert: str,
    specs: list[dict[str, Any]],
    series: dict[str, str],
    firing: list[dict[str, Any]],
    directory: Path,
) -> None:
    """Have promtool find that just these alerts fire on series, with all their labels."""
    time = LATER.get(alert, "45m")
    asked = {"eval_time": time, "alertname": alert, "exp_alerts": firing}
    run_rules(specs, series, {"alert_rule_test": [asked]}, directory)


def run_rules(
    specs: list[dict[str, Any]], series: dict[str, str], tests: dict[str, Any], directory: Path
) -> None:
    """Run tests of promtool's on series, with rules, a file for each release's."""
    files = [directory / f"rules{number}.yaml" for number in range(len(specs))]
    for file, spec in zip(files, specs, strict=True):
        file.write_text(yaml.safe_dump(spec))
    samples = [{"series": name, "values": values} for name, values in series.items()]
    content = {
        "rule_files": [file.name for file in files],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": samples, **tests}],
    }
    (directory / "test.yaml").write_text(yaml.safe_dump(content))
    promtool("test", "rules", "test.yaml", directory=directory)
