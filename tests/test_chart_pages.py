"""What the chart's pages and notes tell people to type, and that they name what exists."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import helm_python
import pytest
import yaml
from helm_render import (
    CHART,
    HUB,
    NOTES,
    REPOSITORY,
    of_kind,
    render,
    render_files,
    slicing_job,
)

from sliceserve.server.serve import make_parser


def test_the_notes_commands_are_typed_one_after_the_other() -> None:
    notes = render_files(HUB)[NOTES]
    job = slicing_job(HUB)["metadata"]["name"]
    assert f"logs -f --pod-running-timeout=30m job/{job}\n" in notes
    assert " &\n" not in notes
    forward, another, ask = notes[notes.index("kubectl -n llm port-forward") :].splitlines()[:3]
    assert forward.endswith("svc/demo-sliceserve 8000:80")
    assert "another terminal" in another
    assert ask.strip().startswith("curl http://localhost:8000/")


COMMANDS = [
    (page, command)
    for page in ("README.md", "docs/operate.md", "helm/sliceserve/README.md")
    for block in re.findall(r"```sh\n(.*?)```", (REPOSITORY / page).read_text(), re.DOTALL)
    for command in re.findall(r"^helm (?:install|upgrade) (?:.*\\\n)*.*", block, re.MULTILINE)
    if "helm/sliceserve" in command  # and not another chart
]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_the_pages_commands_are_not_refused(page: str, command: str) -> None:
    """With the values that Helm itself makes of --set."""
    words = shlex.split(command, comments=True)
    assert words[3] == "helm/sliceserve"
    values: dict[str, Any] = {}
    for flag, expression in pairwise(words):
        if flag == "--set":
            merged = helm_python.parse_set_string(expression)
            place = values
            # Every expression of the pages has one path.
            while isinstance(merged, dict):
                ((name, merged),) = merged.items()
                if isinstance(merged, dict):
                    place = place.setdefault(name, {})
                else:
                    place[name] = merged
    if "--reset-then-reuse-values" in words:
        values = {**HUB, **values}
    assert values
    assert of_kind(render(values), "Job"), page


def test_the_pages_have_commands() -> None:
    assert {page for page, _ in COMMANDS} >= {"docs/operate.md", "helm/sliceserve/README.md"}
    assert any("slice.targetParams=0.75" in command for _, command in COMMANDS)
    assert any("server.replicas=0" in command for _, command in COMMANDS)


def test_the_readme_is_up_to_date_and_says_what_every_value_is() -> None:
    command = [sys.executable, "deploy/chart_readme.py", "helm/sliceserve"]
    page = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert page.stdout == (CHART / "README.md").read_text(), "run `make chart-readme`"
    named = {line.split("`")[1] for line in page.stdout.splitlines() if line.startswith("| `")}

    def leaves(values: dict[str, Any], path: str) -> Iterator[str]:
        for name, value in values.items():
            here = f"{path}.{name}".strip(".")
            if here in named or not isinstance(value, dict):
                yield here
            else:
                yield from leaves(value, here)

    assert set(leaves(yaml.safe_load((CHART / "values.yaml").read_text()), "")) == named


def test_the_operators_page_names_values_and_options_that_exist() -> None:
    """Every dotted value, also of --set, and every option."""
    page = (REPOSITORY / "docs" / "operate.md").read_text()
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    tops = "|".join(values)
    named = set(re.findall(rf"(?<=[`' ])((?:{tops})(?:\.[A-Za-z]+)+)(?=[=`])", page))
    assert len(named) > 25
    free = ("monitoring.labels.release", "slice.resources.limits.memory")
    for name in named - set(free):
        place: Any = values
        for part in name.split("."):
            assert part in place, name
            place = place[part]
    serve = {flag for action in make_parser()._actions for flag in action.option_strings}
    texts = re.findall(r"server\.extraArgs=\{(--[a-z-]+)", page)
    assert set(texts) <= serve
    for flag in ("--max-requests", "--max-num-seqs", "--probe-timeout"):
        assert flag in page
        assert flag in serve
