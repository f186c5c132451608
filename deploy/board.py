"""Print the Grafana board of the chart.

python deploy/board.py > helm/sliceserve/dashboards/sliceserve.json
"""

import json
import math
import sys
from dataclasses import dataclass
from typing import Any

SELECTED = 'namespace=~"$namespace",model_name=~"$model",instance=~"$instance"'
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24  # of Grafana's grid
QUANTILES = (0.5, 0.95, 0.99)


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: above it.
        unit: Grafana's name of the unit.
        queries: PromQL by legend; a tile shows the last value of each.
        note: what it means, where the title does not say.

    """

    title: str
    unit: str
    queries: dict[str, str]
    note: str = ""


def of(series: str, more: str = "") -> str:
    """Select a series of the chosen models and instances."""
    return f"{series}{{{SELECTED}{more}}}"


def rate(series: str, more: str = "") -> str:
    """Return the sum of a counter's rate, a second."""
    return f"sum(rate({of(series, more)}[$__rate_interval]))"


def by_instance(series: str) -> dict[str, str]:
    """Return a gauge, a line an instance."""
    return {"{{instance}}": f"sum by (instance) ({of(series)})"}


def by_gpu(name: str) -> str:
    """Return a gauge, a line a GPU."""
    return f"sum by (instance, gpu) ({of(f'sliceserve_gpu_{name}')})"


def quantiles(series: str) -> dict[str, str]:
    """Return the quantiles of a histogram."""
    rates = f"sum by (le) (rate({of(series + '_bucket')}[$__rate_interval]))"
    return {f"p{q * 100:g}": f"histogram_quantile({q:g}, {rates})" for q in QUANTILES}


def gpu_ms(by: str = "") -> str:
    """Return GPU-milliseconds over tokens written, of 5 minutes."""
    time, tokens = (
        f"sum{by}(rate({of(f'sliceserve_{name}_total')}[5m]))"
        for name in ("gpu_seconds", "generation_tokens")
    )
    return f"1000 * {time} / {tokens}"


PARAMETERS = {
    form: f"sum({of('sliceserve_parameters', f',form={json.dumps(form)}')})"
    for form in ("dense", "sliced")
}
PREFIX = "vllm:prefix_cache"
GPU = "{{instance}} GPU {{gpu}}"
MEMORY_SHARE = f"{by_gpu('memory_used_bytes')} / {by_gpu('memory_total_bytes')}"
READY = of("sliceserve_ready")
RESPONSES = "sliceserve_http_responses_total"
# Probes, scrapes and the status page are not what clients ask for; the alert leaves them out too.
ASKED = ',route!~"/livez|/readyz|/health|/metrics|/status.json|/"'
# Without errors there is no series, and without requests no number.
ERRORS = f"{rate(RESPONSES, ASKED + ',status=~' + json.dumps('5..'))} / {rate(RESPONSES, ASKED)}"
ERRORS = f"{ERRORS} > 0 or vector(0)"

TILES = [
    Panel("Requests", "reqps", {"": rate(RESPONSES, ',route=~"/v1/.*"')}),
    Panel("Tokens in", "short", {"": rate("sliceserve_prompt_tokens_total")}, "a second"),
    Panel("Tokens out", "short", {"": rate("sliceserve_generation_tokens_total")}, "a second"),
    Panel("5xx", "percentunit", {"": ERRORS}, "of all answers to clients"),
    Panel("GPUs in use", "short", {"": f"sum({of('sliceserve_gpus')})"}),
    Panel(
        "GPU-ms per token",
        "ms",
        {"": gpu_ms()},
        "GPUs × time over tokens written, 5 minutes: the paper's measure when the server is busy",
    ),
    Panel(
        "GPUs saved",
        "short",
        {
            "": f"sum({of('sliceserve_gpus')}) * "
            f"({PARAMETERS['dense']} / {PARAMETERS['sliced']} - 1)"
        },
        "that the dense model's weights would take besides, at the same weights a GPU",
    ),
    Panel(
        "Parameters kept", "percentunit", {"": f"{PARAMETERS['sliced']} / {PARAMETERS['dense']}"}
    ),
]
LATENCIES = [
    Panel("Time to first token", "s", quantiles("sliceserve_time_to_first_token_seconds"), "TTFT"),
    Panel(
        "Between tokens",
        "s",
        quantiles("vllm:inter_token_latency_seconds"),
        "every gap of every answer (ITL); a mean of each answer would hide stalls",
    ),
    Panel("Whole request", "s", quantiles("sliceserve_request_latency_seconds"), "E2E"),
]
OVERVIEW = (TILES, LATENCIES)
ROWS = {
    "Latency": [
        *LATENCIES,
        Panel("In the queue", "s", quantiles("sliceserve_queue_time_seconds")),
    ],
    "Admission": [
        Panel(
            "Replicas ready",
            "short",
            {"ready": f"sum({READY})", "scraped": f"count({READY})"},
            "full, draining and failing ones are not, and get nothing from the Service",
        ),
        Panel(
            "Answers by status",
            "reqps",
            {
                "{{status}}": f"sum by (status) (rate({of(RESPONSES)}[$__rate_interval]))",
            },
            "429: no room; 503: starting or leaving; disconnected: the client left",
        ),
        Panel(
            "Refused requests",
            "reqps",
            {
                "{{reason}}": "sum by (reason) "
                f"(rate({of('sliceserve_rejected_total')}[$__rate_interval]))"
            },
            "before they reached the engine",
        ),
        Panel("Requests at work", "short", by_instance("vllm:num_requests_running")),
        Panel("Requests waiting", "short", by_instance("vllm:num_requests_waiting")),
        Panel(
            "Requests let in",
            "short",
            by_instance("sliceserve_running_requests"),
            "what --max-requests counts",
        ),
        Panel(
            "Prompt tokens waiting",
            "short",
            by_instance("sliceserve_queued_prompt_tokens"),
            "what --max-queued-tokens counts",
        ),
    ],
    "GPUs": [
        Panel(
            "GPU-ms per token",
            "ms",
            {"{{model_name}}": gpu_ms(" by (model_name) ")},
            "5 minutes; idle GPUs count too",
        ),
        Panel(
            "GPU memory in use",
            "bytes",
            {GPU: by_gpu("memory_used_bytes")},
            "by all processes; vLLM takes its share at the start",
        ),
        Panel("GPU memory in use, of all", "percentunit", {GPU: MEMORY_SHARE}),
        Panel(
            "GPU utilization",
            "percentunit",
            {GPU: by_gpu("utilization_ratio")},
            "share of time in which a kernel ran, however few of the cores it took",
        ),
    ],
    "Engines": [
        Panel("KV cache in use", "percentunit", by_instance("vllm:kv_cache_usage_perc")),
        Panel(
            "Preemptions",
            "cps",
            {
                "{{instance}}": "sum by (instance) "
                f"(rate({of('vllm:num_preemptions_total')}[$__rate_interval]))"
            },
            "running requests thrown out of the KV cache",
        ),
        Panel(
            "Prefix cache hits",
            "percentunit",
            {"": f"{rate(f'{PREFIX}_hits_total')} / {rate(f'{PREFIX}_queries_total')}"},
            "of prompt tokens looked up",
        ),
        Panel(
            "Tokens out",
            "short",
            {
                "{{instance}}": "sum by (instance) "
                f"(rate({of('sliceserve_generation_tokens_total')}[$__rate_interval]))"
            },
            "a second",
        ),
    ],
}


def drawn(panel: Panel, kind: str, number: int, place: dict[str, int]) -> dict[str, Any]:
    """Return a panel as Grafana stores it."""
    options: dict[str, Any] = {"legend": {"displayMode": "list", "placement": "bottom"}}
    if kind == "stat":
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area"}
    return {
        "id": number,
        "type": kind,
        "title": panel.title,
        "description": panel.note,
        "datasource": DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": options,
        "targets": [
            {"refId": chr(ord("A") + index), "expr": query, "legendFormat": legend or panel.title}
            for index, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def variable(name: str, label: str, query: str) -> dict[str, Any]:
    """Return a variable with all values of a label; all of them match series without it too."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def board() -> dict[str, Any]:
    """Return the whole board."""
    panels: list[dict[str, Any]] = []
    y = 0
    for tiles in OVERVIEW:
        width = COLUMNS // len(tiles)
        for index, tile in enumerate(tiles):
            place = {"x": index * width, "y": y, "w": width, "h": 5}
            panels.append(drawn(tile, "stat", len(panels) + 1, place))
        y += 5
    for title, row in ROWS.items():
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1},
                "panels": [],
            }
        )
        lines = math.ceil(len(row) / 4)
        each = math.ceil(len(row) / lines)
        for index, panel in enumerate(row):
            line, column = divmod(index, each)
            width = COLUMNS // each
            place = {"x": column * width, "y": y + 1 + 8 * line, "w": width, "h": 8}
            panels.append(drawn(panel, "timeseries", len(panels) + 1, place))
        y += 1 + 8 * lines
    within = 'sliceserve_gpus{namespace=~"$namespace"'
    return {
        "title": "sliceserve",
        "uid": "sliceserve",
        "tags": ["sliceserve", "vllm"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {
                    "name": "datasource",
                    "label": "Data source",
                    "type": "datasource",
                    "query": "prometheus",
                },
                variable("namespace", "Namespace", "label_values(sliceserve_gpus, namespace)"),
                variable("model", "Model", f"label_values({within}}}, model_name)"),
                variable(
                    "instance",
                    "Instance",
                    f'label_values({within},model_name=~"$model"}}, instance)',
                ),
            ]
        },
        "panels": panels,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(board(), indent=2) + "\n")
