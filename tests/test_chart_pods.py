"""What the chart's pods are given: probes, sources, secrets, places, and who may reach them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from helm_python import HelmError
from helm_render import (
    CHART,
    FULL,
    HUB,
    NODES,
    SCENARIOS,
    Manifest,
    of_kind,
    pods,
    render,
    scenario,
    server_pod,
    with_values,
)

from sliceserve.server.serve import make_parser, parse_arguments

OURS = {"app.kubernetes.io/instance": "demo", "app.kubernetes.io/name": "sliceserve"}


def policy(manifests: list[Manifest], name: str) -> Any:
    (found,) = (
        one["spec"]
        for one in of_kind(manifests, "NetworkPolicy")
        if one["metadata"]["name"] == f"demo-sliceserve-{name}"
    )
    return found


def job_pod(values: dict[str, Any]) -> Any:
    (job,) = of_kind(render(values), "Job")
    return job["spec"]["template"]["spec"]


def served_with(values: dict[str, Any]) -> list[str]:
    """The arguments of the server."""
    (server,) = server_pod(values)["spec"]["containers"]
    return list(server["args"])


def volumes(pod: Any) -> dict[str, Any]:
    return {volume.pop("name"): volume for volume in pod["volumes"]}


def part(name: str) -> dict[str, Any]:
    return {"podSelector": {"matchLabels": OURS | {"app.kubernetes.io/component": name}}}


def test_nothing_is_let_in_or_out_that_is_not_named() -> None:
    manifests = render(FULL)
    ports = [{"port": 53, "protocol": protocol} for protocol in ("UDP", "TCP")]
    assert policy(manifests, "default-deny") == {
        "podSelector": {"matchLabels": OURS},
        "policyTypes": ["Ingress", "Egress"],
        "egress": [{"ports": ports}],
    }
    namespaces = [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}
        for name in ("monitoring", "gateways")
    ]
    served = [{"port": 8000, "protocol": "TCP"}]
    assert policy(manifests, "server") == part("server") | {
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": {}}, *namespaces], "ports": served}],
    }
    assert policy(manifests, "test") == part("test") | {
        "policyTypes": ["Egress"],
        "egress": [{"to": [part("server")], "ports": served}],
    }
    assert policy(manifests, "slice") == part("slice") | {
        "policyTypes": ["Egress"],
        "egress": [{"ports": [{"port": 443, "protocol": "TCP"}]}],
    }


def test_no_namespace_is_let_in_unless_it_is_named() -> None:
    (rule,) = policy(render(HUB), "server")["ingress"]
    assert rule["from"] == [{"podSelector": {}}]


def test_clients_that_are_no_pods_are_let_in_where_they_are_named() -> None:
    peers = [
        {"ipBlock": {"cidr": "192.0.2.0/24", "except": ["192.0.2.7/32"]}},
        {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "client"}}},
    ]
    (before,) = policy(render(FULL), "server")["ingress"]
    manifests = render(with_values(FULL, "networkPolicy.extraIngress", peers))
    (rule,) = policy(manifests, "server")["ingress"]
    assert rule == before | {"from": before["from"] + peers}
    for one in of_kind(manifests, "NetworkPolicy"):
        kubernetes_validate.validate(one, "1.28", strict=True)


@pytest.mark.parametrize(("minutes", "left_s"), [(1, 30), (4, 120), (6, 180), (40, 180), (90, 180)])
def test_each_probe_asks_its_route_and_a_long_load_has_its_time(minutes: int, left_s: int) -> None:
    values = with_values(FULL, "server.startupMinutes", minutes)
    (server,) = server_pod(values)["spec"]["containers"]
    found = {name: server[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    asked = {name: probe["httpGet"] for name, probe in found.items()}
    # A server that is full or leaves is not ready, and must not be killed for it.
    assert asked == {
        "startup": {"path": "/readyz", "port": "http"},
        "readiness": {"path": "/readyz", "port": "http"},
        "liveness": {"path": "/livez", "port": "http"},
    }
    startup = found["startup"]
    given_s = startup["periodSeconds"] * startup["failureThreshold"]
    assert given_s == minutes * 60
    # So that the log says what the start was doing before the kubelet ends it, which has counted
    # the imports too.
    _, settings = parse_arguments(make_parser(), ["/checkpoint", *server["args"]])
    assert settings.start_timeout == given_s - left_s


def test_a_load_of_140_gb_at_100_mb_a_second_is_waited_for() -> None:
    (server,) = server_pod(HUB)["spec"]["containers"]
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 140e9 / 100e6


def test_the_job_finds_the_model_wherever_it_is() -> None:
    from_hub = job_pod(FULL)
    (slicer,) = from_hub["containers"]
    env = {entry["name"]: entry for entry in slicer["env"]}
    assert env["HF_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
    # What was downloaded is there when the Job goes on.
    assert env["HF_HOME"]["value"].startswith("/checkpoints/")
    claim = {"persistentVolumeClaim": {"claimName": "demo-sliceserve-checkpoints"}}
    assert volumes(from_hub)["checkpoints"] == claim
    for name, volume in {
        "oci": {
            "image": {
                "reference": "registry.example.com/models/llama:1",
                "pullPolicy": "IfNotPresent",
            }
        },
        "hpa": {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
        "cpu": {"emptyDir": {"sizeLimit": "200Gi"}},
    }.items():
        pod = job_pod(scenario(CHART / "ci" / f"{name}-values.yaml"))
        assert volumes(pod)["model"] == volume
        mounts = {mount["name"]: mount for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts["model"] == {"name": "model", "mountPath": "/model", "readOnly": True}
        for download in pod.get("initContainers", []):
            assert download["envFrom"] == [{"secretRef": {"name": "object-storage"}}]
            assert {"name": "model", "mountPath": "/model"} in download["volumeMounts"]
        assert bool(pod.get("initContainers")) == (name == "cpu")


# The secrets that each scenario's pods name.
SECRETS: dict[str, set[str]] = {
    "cpu": {"object-storage"}, "full": {"hub", "keys", "registry"}, "hpa": set(), "hub": set(),
    "nodes": {"keys"}, "oci": set(),
}  # fmt: skip


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.name)
def test_secrets_are_named_and_never_made(path: Path) -> None:
    """By every container of every pod, those that come first and the Job's too."""
    manifests = render(scenario(path))
    assert of_kind(manifests, "Secret") == []
    named: set[str] = set()
    for pod in pods(manifests):
        spec = pod["spec"]
        named |= {secret["name"] for secret in spec.get("imagePullSecrets", [])}
        volumes = [volume for volume in spec.get("volumes", []) if "secret" in volume]
        named |= {volume["secret"]["secretName"] for volume in volumes}
        for container in spec["containers"] + spec.get("initContainers", []):
            entries = container.get("env", [])
            plain = [entry["name"] for entry in entries if "value" in entry]
            assert not [name for name in plain if re.search("TOKEN|KEY|SECRET|PASS", name)]
            sources = [entry["valueFrom"] for entry in entries if "valueFrom" in entry]
            for source in sources + container.get("envFrom", []):
                ((kind, reference),) = source.items()
                assert kind in ("secretKeyRef", "secretRef", "fieldRef")
                named |= {reference["name"]} if kind != "fieldRef" else set()
    assert named == SECRETS[path.name.removesuffix("-values.yaml")]


def test_no_value_of_the_chart_is_a_secret() -> None:
    """Those named as one hold the name of a Secret, or of a key in it."""
    schema = json.loads((CHART / "values.schema.json").read_text())

    def leaves(properties: dict[str, Any], path: str = "") -> Iterator[str]:
        for name, value in properties.items():
            yield from leaves(value.get("properties", {}), f"{path}{name}.")
            if "properties" not in value:
                yield f"{path}{name}"

    found = {
        path
        for path in leaves(schema["properties"])
        if re.search("(?i)token|key|secret|auth|pass", path)
    }
    assert found == {
        "auth.existingSecret", "auth.key", "image.pullSecrets", "ingress.tlsSecret",
        "model.download.existingSecret", "model.hubToken.existingSecret", "model.hubToken.key",
    }  # fmt: skip


@pytest.mark.parametrize("version", ["1.28.0", "1.30.9"])
def test_an_image_volume_is_refused_where_kubernetes_has_none(version: str) -> None:
    oci = scenario(CHART / "ci" / "oci-values.yaml")
    sentence = f"model.image.reference needs Kubernetes 1.31 or newer, and this is v{version}"
    with pytest.raises(HelmError, match=re.escape(sentence)):
        render(oci, version)
    assert of_kind(render(oci, "1.31.0"), "Job")
    assert of_kind(render(HUB, version), "Job")


def test_the_pod_of_helm_test_runs_where_the_server_does_and_keeps_its_log() -> None:
    """Helm 3 asks for the log after it has deleted what is deleted on success."""
    (pod,) = of_kind(render(FULL), "Pod")
    server = server_pod(FULL)["spec"]
    for key in ("nodeSelector", "tolerations"):
        assert pod["spec"][key] == server[key]
    annotations = pod["metadata"]["annotations"]
    assert annotations["helm.sh/hook-delete-policy"] == "before-hook-creation"


def test_pods_run_where_and_as_whom_they_should() -> None:
    manifests = render(FULL)
    server, slicer = server_pod(FULL)["spec"], job_pod(FULL)
    tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    for pod, name in ((server, "server"), (slicer, "slice")):
        assert pod["serviceAccountName"] == f"demo-sliceserve-{name}"
        assert pod["imagePullSecrets"] == [{"name": "registry"}]
        assert pod["nodeSelector"] == {"gpu": "h100"}
        assert pod["tolerations"] == tolerations
        assert pod["runtimeClassName"] == "nvidia"
    assert server["priorityClassName"] == "serving"
    (spread,) = server["topologySpreadConstraints"]
    assert spread["topologyKey"] == "kubernetes.io/hostname"
    assert {"labelSelector": spread["labelSelector"]} == {
        "labelSelector": part("server")["podSelector"]
    }
    (claim,) = of_kind(manifests, "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


def test_a_group_never_goes_below_capacity_and_no_rollout_gives_up() -> None:
    (group,) = of_kind(render(NODES), "LeaderWorkerSet")
    rolling = {"maxUnavailable": 0, "maxSurge": 1}
    strategy = {"type": "RollingUpdate", "rollingUpdateConfiguration": rolling}
    assert group["spec"]["rolloutStrategy"] == strategy
    (deployment,) = of_kind(render(FULL), "Deployment")
    assert deployment["spec"]["progressDeadlineSeconds"] >= 24 * 3600


def test_a_group_rolls_without_free_gpus_where_that_is_wanted() -> None:
    """Its only type is a rolling one, so that one group makes room for its successor."""
    values = with_values(NODES, "server.updateStrategy", "Recreate")
    (group,) = of_kind(render(values), "LeaderWorkerSet")
    rolling = {"maxUnavailable": 1, "maxSurge": 0}
    strategy = {"type": "RollingUpdate", "rollingUpdateConfiguration": rolling}
    assert group["spec"]["rolloutStrategy"] == strategy


def test_a_service_and_its_pods_have_the_annotations_that_they_are_given() -> None:
    given = {"example.com/on": "true", "example.com/port": "8000"}
    for scenario_values in (FULL, NODES):
        values = with_values(scenario_values, "service.annotations", given)
        manifests = render(with_values(values, "server.podAnnotations", given))
        (service,) = of_kind(manifests, "Service")
        assert service["metadata"]["annotations"] == given
        for pod in pods(manifests):
            found = pod["metadata"].get("annotations", {})
            part = pod["metadata"]["labels"]["app.kubernetes.io/component"]
            assert (found == given) == (part in ("server", "worker"))
    plain = render(HUB)
    (service,) = of_kind(plain, "Service")
    assert "annotations" not in service["metadata"]
    assert "annotations" not in server_pod(HUB)["metadata"]


@pytest.mark.parametrize("user", [10001, 1000730000])
def test_all_pods_have_one_user_who_may_write_to_their_volumes(user: int) -> None:
    for pod in pods(render(with_values(FULL, "podSecurity.user", user))):
        context = pod["spec"]["securityContext"]
        assert {context[key] for key in ("runAsUser", "runAsGroup", "fsGroup")} == {user}


@pytest.mark.parametrize("values", [FULL, NODES], ids=["deployment", "group"])
def test_no_pod_names_a_user_where_the_cluster_chooses_one(values: dict[str, Any]) -> None:
    """OpenShift's constraint "restricted-v2" refuses pods with a user or group of their choice."""
    found = list(pods(render(with_values(values, "podSecurity.user", None))))
    assert len(found) >= 3
    for pod in found:
        contexts = [pod["spec"]["securityContext"]]
        for container in pod["spec"]["containers"] + pod["spec"].get("initContainers", []):
            contexts.append(container["securityContext"])
        for context in contexts:
            assert not context.keys() & {"runAsUser", "runAsGroup", "fsGroup"}
        assert contexts[0]["runAsNonRoot"] is True
        assert contexts[0]["seccompProfile"] == {"type": "RuntimeDefault"}


def test_answers_that_take_long_pass_the_ingress_and_the_route() -> None:
    manifests = render(FULL)
    (ingress,) = of_kind(manifests, "Ingress")
    (rule,) = ingress["spec"]["rules"]
    service = {"service": {"name": "demo-sliceserve", "port": {"name": "http"}}}
    assert rule["http"]["paths"] == [{"path": "/v1", "pathType": "Prefix", "backend": service}]
    (route,) = of_kind(manifests, "HTTPRoute")
    (matched,) = route["spec"]["rules"]
    assert matched["matches"] == [{"path": {"type": "PathPrefix", "value": "/v1"}}]
    assert matched["timeouts"] == {"request": "3600s"}
    # Definitions before Gateway API 1.2 have no timeouts.
    (route,) = of_kind(render(with_values(FULL, "httpRoute.requestTimeout", "")), "HTTPRoute")
    assert "timeouts" not in route["spec"]["rules"][0]
    plain = with_values(HUB, "ingress", {"enabled": True, "host": "llm.example.com"})
    (ingress,) = of_kind(render(plain), "Ingress")
    annotations = ingress["metadata"]["annotations"]
    for what in ("read", "send"):
        assert annotations[f"nginx.ingress.kubernetes.io/proxy-{what}-timeout"] == "3600"
    # Its own limit is a megabyte.
    size: str = annotations["nginx.ingress.kubernetes.io/proxy-body-size"]
    _, settings = parse_arguments(make_parser(), ["/checkpoint", *served_with(plain)])
    assert int(size.removesuffix("m")) * 2**20 == settings.max_body_size
