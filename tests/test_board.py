"""The Grafana board; that its series are exported is checked in test_server.py."""

import json
import re
import subprocess
import sys
from typing import Any

from helm_render import (
    BOARD,
    FULL,
    REPOSITORY,
    board,
    board_expressions,
    of_kind,
    render,
    with_values,
)


def test_the_file_is_what_the_script_prints() -> None:
    script = REPOSITORY / "deploy" / "board.py"
    printed = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert printed.stdout == BOARD.read_text(), f"run: python {script} > {BOARD}"


def test_panels_do_not_overlap_and_have_numbers_of_their_own() -> None:
    panels = board()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (place["x"] + column, place["y"] + line)
            for column in range(place["w"])
            for line in range(place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(column for column, _ in cells) < 24
        taken |= cells


def test_every_query_follows_the_variables() -> None:
    content = board()
    variables = {variable["name"] for variable in content["templating"]["list"]}
    assert variables == {"datasource", "namespace", "model", "instance"}
    for panel in content["panels"]:
        for target in panel.get("targets", []):
            selectors = re.findall(r"\{([^{}]*)\}", target["expr"])
            assert selectors, panel["title"]
            for selector in selectors:
                for name in ("namespace", "model", "instance"):
                    assert f'"${name}"' in selector, panel["title"]
            assert panel["datasource"]["uid"] == "${datasource}"
    assert len(board_expressions()) >= 20


def test_errors_are_those_that_the_alert_counts() -> None:
    """Of clients' requests, and 0 rather than nothing while there are none."""
    (tile,) = [panel for panel in board()["panels"] if panel["title"] == "5xx"]
    (target,) = tile["targets"]
    rules = of_kind(render(FULL), "PrometheusRule")
    alerts = {rule.get("alert"): rule for rule in rules[0]["spec"]["groups"][0]["rules"]}
    left_out = re.findall(r'route!~"[^"]+"', alerts["SliceserveErrors"]["expr"])
    assert len(set(left_out)) == 1
    assert re.findall(r'route!~"[^"]+"', target["expr"]) == left_out
    assert target["expr"].endswith("> 0 or vector(0)")


def test_what_is_let_in_is_shown_with_what_is_refused() -> None:
    panels = board()["panels"]
    (start, end) = (
        next(n for n, panel in enumerate(panels) if (panel["type"], panel["title"]) == ("row", row))
        for row in ("Admission", "GPUs")
    )
    shown = " ".join(target["expr"] for p in panels[start:end] for target in p.get("targets", []))
    for series in ("ready", "running_requests", "queued_prompt_tokens", "rejected_total"):
        assert f"sliceserve_{series}{{" in shown
    assert {p["gridPos"]["w"] for p in panels[start + 1 : end]} == {6}


def test_latencies_are_among_the_tiles() -> None:
    """Three values each, before the first row."""
    panels = board()["panels"]
    first = next(number for number, panel in enumerate(panels) if panel["type"] == "row")
    tiles = [panel for panel in panels[:first] if len(panel["targets"]) > 1]
    shown = {}
    for tile in tiles:
        assert tile["type"] == "stat"
        legends = {target["legendFormat"]: target["expr"] for target in tile["targets"]}
        for legend, quantile in (("p50", "0.5"), ("p95", "0.95"), ("p99", "0.99")):
            found = re.fullmatch(
                rf"histogram_quantile\({quantile}, sum by \(le\) \(rate\((\S+)_bucket\{{.*",
                legends.pop(legend),
            )
            assert found
            shown[tile["title"]] = found[1]
        assert not legends
    assert shown == {
        "Time to first token": "sliceserve_time_to_first_token_seconds",
        "Between tokens": "vllm:inter_token_latency_seconds",
        "Whole request": "sliceserve_request_latency_seconds",
    }


def provisioned(release: str) -> tuple[str, dict[str, Any]]:
    """The file that Grafana's sidecar writes for a release."""
    maps = of_kind(render(FULL, release=release), "ConfigMap")
    ((name, text),) = (item for one in maps for item in one["data"].items())
    content: dict[str, Any] = json.loads(text)
    return name, content


def test_the_sidecar_finds_the_board() -> None:
    (found,) = of_kind(render(FULL), "ConfigMap")
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    _, content = provisioned("demo")
    same = {name: value for name, value in content.items() if name not in ("title", "uid")}
    assert same == {name: board()[name] for name in same}
    assert content.keys() == board().keys()
    assert not of_kind(render(with_values(FULL, "monitoring.board.enabled", False)), "ConfigMap")


def test_each_release_has_a_board_of_its_own() -> None:
    """The sidecar writes all into one folder, where Grafana wants other uids and other titles."""
    (first, one), (second, other) = (provisioned(name) for name in ("demo", "other"))
    assert (first, second) == ("llm.demo-sliceserve.json", "llm.other-sliceserve.json")
    assert one["title"] == "sliceserve: demo in llm"
    assert other["title"] == "sliceserve: other in llm"
    assert one["uid"] != other["uid"]
    for content in (one, other, provisioned("a" * 53)[1]):
        # As Grafana takes them.
        assert re.fullmatch("[a-zA-Z0-9_-]{1,40}", content["uid"])
