"""Every value of the chart has an effect, lists are checked too, and releases have long names."""

import json
import re
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import pytest
import yaml
from helm_python import HelmError
from helm_render import (
    CHART,
    FULL,
    HPA,
    HUB,
    NODES,
    of_kind,
    pods,
    render,
    scenario,
    with_values,
)

DEFAULTS: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
# Values, or groups of them, that do nothing in the full scenario, and one in which they do.
SCENARIOS = {
    "image.tag": HUB,
    "model.claim": HPA,
    "model.image": scenario(CHART / "ci" / "oci-values.yaml"),
    "model.download": scenario(CHART / "ci" / "cpu-values.yaml"),
    "checkpoints.accessMode": HUB,
    "server.replicas": with_values(FULL, "autoscaling.kind", "none"),
    "autoscaling.podsMetric": HPA,
}
ENVIRONMENT = [{"name": "OTHER", "value": "other"}]
TOLERATIONS = [{"operator": "Exists"}]
# What a value may be where its type does not say it.
OTHERS: dict[str, Any] = {
    "image.digest": f"sha256:{'0' * 64}",
    "image.pullPolicy": "Always",
    "model.hub": "other/name",
    "model.download.size": "7Gi",
    "slice.fraction": 0.5,
    "slice.extraEnv": ENVIRONMENT,
    "slice.tolerations": TOLERATIONS,
    "checkpoints.size": "7Gi",
    "checkpoints.accessMode": "ReadWriteMany",
    "server.updateStrategy": "Recreate",
    "server.extraEnv": ENVIRONMENT,
    "server.cacheSize": "7Gi",
    "server.tolerations": TOLERATIONS,
    "service.type": "NodePort",
    "networkPolicy.extraIngress": [{"ipBlock": {"cidr": "192.0.2.0/24"}}],
    "networkPolicy.jobEgress": [{"ports": [{"port": 8080}]}],
    "networkPolicy.serverEgress": [{"ports": [{"port": 8080}]}],
    "autoscaling.kind": "none",
    "httpRoute.parentRefs": [{"name": "other"}],
    "httpRoute.requestTimeout": "7s",
    "monitoring.monitor": "pod",
    "monitoring.interval": "7s",
    "monitoring.rules.errorRatio": 0.5,
    "monitoring.rules.cacheUsage": 0.5,
    "monitoring.rules.regression": 2,
}


def leaves(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Values by their paths; the maps that are free are one."""
    free = ("requests", "limits", "nodeSelector", "affinity", "annotations", "podAnnotations",
            "labels")  # fmt: skip
    for name, value in values.items():
        here = f"{path}.{name}".strip(".")
        if isinstance(value, dict) and name not in free:
            yield from leaves(value, here)
        else:
            yield here, value


def found(values: dict[str, Any], path: str, default: Any) -> Any:
    for name in path.split("."):
        if name not in values:
            return default
        values = values[name]
    return values


def another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return {str: "other", list: ["other"], dict: {"other": "other"}}[type(value)]


def rendered(values: dict[str, Any]) -> str:
    """All manifests, without the sums in names, which know of values that nothing else uses."""
    return re.sub(r"\b[0-9a-f]{10}\b", "SUM", json.dumps(render(values)))


@pytest.mark.parametrize(("path", "default"), list(leaves(DEFAULTS)))
def test_every_value_has_an_effect(path: str, default: Any) -> None:
    group, _, _ = path.rpartition(".")
    values = SCENARIOS.get(path, SCENARIOS.get(group, FULL))
    value = OTHERS[path] if path in OTHERS else another(found(values, path, default))
    assert rendered(with_values(values, path, value)) != rendered(values)


TYPO = {"typpo": 1}
PEER = {"ipBlock": {"cidr": "192.0.2.0/24"}}


@pytest.mark.parametrize(
    ("path", "item"),
    [
        ("slice.extraEnv", {"name": "A", **TYPO}),
        ("server.extraEnv", {"name": "A", **TYPO}),
        ("server.extraEnv", {"name": "A", "valueFrom": TYPO}),
        ("slice.tolerations", {"operator": "Exists", **TYPO}),
        ("server.tolerations", {"operator": "Exists", **TYPO}),
        ("networkPolicy.extraIngress", PEER | TYPO),
        ("networkPolicy.extraIngress", {"ipBlock": PEER["ipBlock"] | TYPO}),
        ("networkPolicy.extraIngress", {"podSelector": TYPO}),
        ("networkPolicy.extraIngress", {"namespaceSelector": {"matchExpressions": [TYPO]}}),
        ("networkPolicy.jobEgress", {"to": [PEER], **TYPO}),
        ("networkPolicy.serverEgress", {"to": [PEER | TYPO]}),
        ("networkPolicy.serverEgress", {"ports": [TYPO]}),
        ("networkPolicy.jobEgress", {"ports": [{"port": 443, **TYPO}]}),
        ("httpRoute.parentRefs", {"name": "gateway", **TYPO}),
    ],
)
def test_a_typo_in_a_list_is_refused(path: str, item: dict[str, Any]) -> None:
    with pytest.raises(HelmError, match="typpo"):
        render(with_values(FULL, path, [item]))


@pytest.mark.parametrize(
    ("path", "item"),
    [
        ("server.extraEnv", {"name": "A", "value": 1}),
        ("slice.extraEnv", {"name": "A", "valueFrom": {}}),
        ("server.tolerations", {"operator": "exists"}),
        ("networkPolicy.extraIngress", {}),
        ("networkPolicy.extraIngress", {"ipBlock": {"except": []}}),
        ("networkPolicy.jobEgress", {"ports": [{"protocol": "HTTP"}]}),
        ("networkPolicy.serverEgress", {"ports": [{"protocol": "HTTP"}]}),
        ("httpRoute.parentRefs", {"namespace": "gateways"}),
    ],
)
def test_an_impossible_item_is_refused(path: str, item: dict[str, Any]) -> None:
    with pytest.raises(HelmError, match=path.rsplit(".", 1)[1]):
        render(with_values(FULL, path, [item]))


def test_what_kubernetes_takes_in_a_list_passes() -> None:
    """All fields at once, by the schemas of Kubernetes."""
    labels = {"matchLabels": {"app": "a"}}
    selector = labels | {"matchExpressions": [{"key": "b", "operator": "In", "values": ["c"]}]}
    environment = [
        {"name": "A", "value": "a"},
        {"name": "B", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
        {"name": "C", "valueFrom": {"configMapKeyRef": {"name": "s", "key": "k"}}},
        {"name": "D", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}},
        {"name": "E", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
    ]
    toleration = {"key": "a", "operator": "Equal", "value": "b", "effect": "NoExecute"}
    peers = [PEER, {"namespaceSelector": {}, "podSelector": selector}]
    ports = [{"protocol": "TCP", "port": 1, "endPort": 2}, {"port": "http"}]
    values = FULL
    for path, items in (
        ("server.extraEnv", environment),
        ("slice.extraEnv", environment),
        ("server.tolerations", [toleration | {"tolerationSeconds": 7}]),
        ("networkPolicy.extraIngress", peers),
        ("networkPolicy.jobEgress", [{"to": peers, "ports": ports}, {"to": peers}]),
        ("networkPolicy.serverEgress", [{"to": peers, "ports": ports}, {"to": peers}]),
    ):
        values = with_values(values, path, items)
    manifests = render(values)
    for kind in ("Deployment", "Job", "NetworkPolicy"):
        for manifest in of_kind(manifests, kind):
            kubernetes_validate.validate(manifest, "1.33", strict=True)


CUSTOM = {"HTTPRoute", "LeaderWorkerSet", "PodMonitor", "PrometheusRule", "ScaledObject",
          "ServiceMonitor"}  # fmt: skip
LABEL = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"


@pytest.mark.parametrize("values", [FULL, NODES, HPA], ids=["full", "nodes", "hpa"])
@pytest.mark.parametrize("release", ["sliceserve", "a" * 53, f"{'b' * 39}-{'c' * 13}"])
def test_a_release_has_any_name_that_helm_takes(release: str, values: dict[str, Any]) -> None:
    """Names and labels as Kubernetes and its controllers make them of it."""
    manifests = render(values, release=release)
    for manifest in manifests:
        assert re.fullmatch(LABEL, manifest["metadata"]["name"])
        assert len(manifest["metadata"]["name"]) <= 63
        if manifest["kind"] not in CUSTOM:
            kubernetes_validate.validate(manifest, "1.33", strict=True)
    for pod in pods(manifests):
        labels = pod["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == release
        assert all(len(value) <= 63 for value in labels.values())
    # A pod's name is its host name; a label of a group's pods has the sum of their revision.
    for kind, more in (("Deployment", "-0123456789-01234"), ("LeaderWorkerSet", "-99-0123456789")):
        for owner in of_kind(manifests, kind):
            assert len(owner["metadata"]["name"] + more) <= 63
    (asking,) = of_kind(manifests, "Pod")
    (service,) = of_kind(manifests, "Service")
    url = asking["spec"]["containers"][0]["args"][1]
    assert url == f"http://{service['metadata']['name']}:80"
