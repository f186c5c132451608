"""Custom resources against their own definitions.

For those of Prometheus' and KEDA's operators there are packages of models made from the definitions
themselves; of the others every field is listed here.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule, ServiceMonitor
from helm_render import FULL, NODES, SCENARIOS, Manifest, of_kind, render, scenario, with_values
from pydantic import ValidationError

MODELS = (PodMonitor, PrometheusRule, ScaledObject, ServiceMonitor)
KINDS = {model.__name__: model for model in MODELS}
# The maps of any names, beside those of KEDA's triggers.
FREE = {"annotations", "labels", "matchLabels"}


def rendered() -> dict[str, Manifest]:
    """Each of these resources, as the scenario has it that has most to say."""
    manifests = [manifest for path in SCENARIOS for manifest in render(scenario(path))]
    found = [manifest for manifest in manifests if manifest["kind"] in KINDS]
    return {one["kind"]: one for one in sorted(found, key=lambda one: len(json.dumps(one)))}


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The paths of all objects whose fields are those of a definition."""
    if isinstance(value, list):
        for index, entry in enumerate(value):
            yield from places(entry, (*path, index))
    elif isinstance(value, dict) and (path[-1:] != ("metadata",) or len(path) == 1):
        yield path
        for name, entry in value.items():
            if name not in FREE:
                yield from places(entry, (*path, name))


def changed(manifest: Manifest, path: tuple[str | int, ...], name: str, value: Any) -> Manifest:
    """A copy with one field that is another."""
    copy: Manifest = json.loads(json.dumps(manifest))
    place: Any = copy
    for step in path:
        place = place[step]
    place[name] = value
    return copy


def test_every_scenarios_resources_are_taken_as_they_are() -> None:
    taken = set()
    for path in SCENARIOS:
        for manifest in render(scenario(path)):
            if model := KINDS.get(manifest["kind"]):
                read = model.model_validate(manifest, extra="forbid")
                # As written, and nothing else: these models would also take names of Python's.
                written = read.model_dump(mode="json", by_alias=True, exclude_unset=True)
                assert written == manifest
                taken.add(manifest["kind"])
    assert taken == KINDS.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_that_a_definition_lacks_is_refused(kind: str) -> None:
    manifest = rendered()[kind]
    found = list(places(manifest))
    assert {("metadata",), ("spec",)} < set(found)
    for path in found:
        with pytest.raises(ValidationError, match="typpo"):
            KINDS[kind].model_validate(changed(manifest, path, "typpo", 1), extra="forbid")


@pytest.mark.parametrize(
    ("kind", "path", "name", "value"),
    [
        ("ScaledObject", ("spec", "scaleTargetRef"), "name", None),
        ("ScaledObject", ("spec",), "maxReplicaCount", "four"),
        ("ScaledObject", ("spec", "triggers", 0, "metadata"), "threshold", 5),
        ("ServiceMonitor", ("spec", "endpoints", 0), "interval", "15 seconds"),
        ("PodMonitor", ("spec", "podMetricsEndpoints", 0), "interval", "15 seconds"),
        ("PrometheusRule", ("spec", "groups", 0, "rules", 1), "for", "5 minutes"),
        ("PrometheusRule", ("spec", "groups", 0, "rules", 1, "labels"), "severity", 1),
    ],
)  # fmt: skip
def test_a_value_that_a_definition_forbids_is_refused(
    kind: str, path: tuple[str | int, ...], name: str, value: Any
) -> None:
    manifest = rendered()[kind]
    with pytest.raises(ValidationError):
        KINDS[kind].model_validate(changed(manifest, path, name, value), extra="forbid")


def fields(value: Any, path: str = "") -> Iterator[str]:
    """The paths of all fields, but within pods, for which Kubernetes' own schemas are."""
    if isinstance(value, list):
        for entry in value:
            yield from fields(entry, path)
    elif isinstance(value, dict) and not path.endswith(("leaderTemplate", "workerTemplate")):
        for name, entry in value.items():
            yield from fields(entry, f"{path}.{name}".strip("."))
    else:
        yield path


# As in the definitions of Gateway API 1.2 and of LeaderWorkerSet's v1, for the fullest scenarios.
FIELDS = {
    "HTTPRoute": """
        hostnames parentRefs.name parentRefs.namespace rules.backendRefs.name
        rules.backendRefs.port rules.matches.path.type rules.matches.path.value
        rules.timeouts.request
    """,
    "LeaderWorkerSet": """
        leaderWorkerTemplate.leaderTemplate leaderWorkerTemplate.restartPolicy
        leaderWorkerTemplate.size leaderWorkerTemplate.workerTemplate replicas
        rolloutStrategy.rollingUpdateConfiguration.maxSurge
        rolloutStrategy.rollingUpdateConfiguration.maxUnavailable rolloutStrategy.type
    """,
}
BY_HAND = with_values(NODES, "autoscaling.kind", "none")


@pytest.mark.parametrize(("kind", "values"), [("HTTPRoute", FULL), ("LeaderWorkerSet", BY_HAND)])
def test_other_resources_have_the_fields_of_their_definitions(
    kind: str, values: dict[str, Any]
) -> None:
    (manifest,) = of_kind(render(values), kind)
    assert manifest.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert sorted(set(fields(manifest["spec"]))) == FIELDS[kind].split()
