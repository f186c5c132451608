"""The Grafana board; that its series are exported is checked in test_server.py."""

import json
import re
import subprocess
import sys

from helm_render import (
    BOARD,
    CHART,
    REPOSITORY,
    board,
    board_expressions,
    of_kind,
    render,
    scenario,
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
    rules = of_kind(render(scenario(CHART / "ci" / "full-values.yaml")), "PrometheusRule")
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


def test_the_sidecar_finds_the_board() -> None:
    values = scenario(CHART / "ci" / "full-values.yaml")
    maps = of_kind(render(values), "ConfigMap")
    (found,) = [one for one in maps if "sliceserve.json" in one["data"]]
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(found["data"]["sliceserve.json"]) == board()
    values["monitoring"]["board"]["enabled"] = False
    assert not of_kind(render(values), "ConfigMap")
