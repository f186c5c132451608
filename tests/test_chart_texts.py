"""Every text among the chart's values stays a text, whatever it looks like to a YAML parser."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from helm_render import CHART, SCENARIOS, render, scenario, with_values

SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
TEXTS = ["2024", "on", "1e3", "null", "~", "0x10", "1_000", "2024-01-01", "a: b", "c:", "# d",
         "e #f", "- g", "*h", "!i", "[j", "{k", "@l", "'m", "|n", "*.example.com"]  # fmt: skip
# Of these a scenario has what it names itself.
ONE_OF = ("model.hub", "model.revision", "model.claim", "model.image", "model.download",
          "checkpoints.existingClaim")  # fmt: skip
# Texts that no pattern lets look like anything else.
PLAIN = {"image.digest", "httpRoute.requestTimeout", "monitoring.interval"}
MARK = re.compile(r"mark-\d\dx|5555\d\d")
LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?")


def texts_of(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Values that are texts, lists or maps of them: path, and how one is made of a text."""
    for name, value in schema["properties"].items():
        here = f"{path}.{name}".strip(".")
        if "properties" in value:
            yield from texts_of(value, here)
        elif value.get("type") == "string":
            yield here, value | {"make": lambda text: text}
        elif value.get("items", {}).get("type") == "string":
            yield here, value["items"] | {"make": lambda text: [text]}
        elif (each := value.get("additionalProperties")) and each["type"] == "string":
            yield here, each | {"make": lambda text: {"key": text}}
        elif value.get("items", {}).get("$ref") == "#/definitions/environment":
            yield here, {"make": lambda text: [{"name": "NAME", "value": text}]}


PLACES = dict(texts_of(SCHEMA))
SOURCES = {path.name.removesuffix("-values.yaml"): scenario(path) for path in SCENARIOS}


def has(values: dict[str, Any], path: str) -> bool:
    for name in path.split("."):
        if name not in values:
            return False
        values = values[name]
    return True


def filled(name: str, text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A scenario with all texts marked, each by another mark, and with this text in their place."""
    marked = given = SOURCES[name]
    for number, (path, place) in enumerate(PLACES.items(), 10):
        group = next((one for one in ONE_OF if path.startswith(one)), None)
        if group and not has(SOURCES[name], group):
            continue
        if path == "model.servedName" and name == "hub":
            continue  # the last part of the hub's
        if path == "model.servedName" and name == "hpa" and not LABEL.fullmatch(text):
            # The scaler asks by it only if it can be a label.
            marked, given = (with_values(values, path, "fixed") for values in (marked, given))
            continue
        for mark in (f"mark-{number}x", f"5555{number}"):
            before, after = (f"owner/{it}" if path == "model.hub" else it for it in (mark, text))
            if all(re.search(place.get("pattern", ""), it) for it in (before, after)):
                marked = with_values(marked, path, place["make"](before))
                given = with_values(given, path, place["make"](after))
                break
    return marked, given


def leaves(node: Any) -> Iterator[tuple[type, Any]]:
    """Every key and every value of a manifest that holds no others, without sums in names."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(key)
            yield from leaves(value)
    elif isinstance(node, list):
        for part in node:
            yield from leaves(part)
    else:
        text = isinstance(node, str)
        yield type(node), re.sub(r"\b[0-9a-f]{10}\b", "SUM", node) if text else node


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_stays_a_text_whatever_it_looks_like(text: str) -> None:
    """All of a scenario at once; what is rendered is what it is with words, but for the words."""
    for name in SOURCES:
        marked, given = filled(name, text)
        wanted = json.loads(MARK.sub(lambda _: json.dumps(text)[1:-1], json.dumps(render(marked))))
        found = render(given)
        assert Counter(leaves(found)) == Counter(leaves(wanted)), name


def test_no_text_of_the_schema_is_forgotten() -> None:
    """Each is rendered in one scenario or another."""
    rendered = json.dumps([render(filled(name, "2024")[0]) for name in SOURCES])
    numbers = {int(mark.strip("x")[-2:]) for mark in MARK.findall(rendered)}
    found = {path for number, path in enumerate(PLACES, 10) if number in numbers}
    assert found == PLACES.keys() - PLAIN
    assert len(PLACES) < 90, "or a mark has three digits"
    assert {
        "auth.key", "autoscaling.prometheusAddress", "checkpoints.existingClaim",
        "checkpoints.size", "model.claim.name", "model.download.existingSecret",
        "model.download.image", "model.image.reference", "model.revision", "server.extraArgs",
        "server.podAnnotations", "slice.extraArgs",
    } <= found  # fmt: skip
