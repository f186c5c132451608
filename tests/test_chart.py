"""The chart under a real Helm: every scenario rendered and checked against Kubernetes' schemas."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
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
    NOTES,
    SCENARIOS,
    of_kind,
    pods,
    render,
    render_files,
    scenario,
    selects,
    server_pod,
    slicing_job,
    with_values,
)

from sliceserve.server.serve import make_parser, parse_arguments

NEWEST = int(kubernetes_validate.latest_version().split(".")[1])
ids = {"ids": lambda path: path.name.removesuffix("-values.yaml")}


@pytest.mark.parametrize("path", SCENARIOS, **ids)
def test_lint_finds_nothing(path: Path) -> None:
    report = helm_python.lint(CHART, scenario(path), strict=True)
    assert report["total_charts_linted"] == 1
    assert report["errors"] == []
    assert [m for m in report["messages"] if m["severity"] > 1] == []


@pytest.mark.parametrize("minor", range(28, NEWEST + 1))
def test_kubernetes_takes_every_manifest(minor: int) -> None:
    """Strictly: no field that this version does not know."""
    # What scenarios share is checked once.
    manifests = {
        json.dumps(manifest, sort_keys=True)
        for path in SCENARIOS
        if path.name != "oci-values.yaml" or minor >= 31
        for manifest in render(scenario(path), f"1.{minor}.0")
    }
    kinds = set()
    for manifest in map(json.loads, manifests):
        group = manifest["apiVersion"].split("/")[0]
        if group in ("monitoring.coreos.com", "keda.sh", "gateway.networking.k8s.io"):
            continue  # in test_chart_custom.py
        found = [manifest]
        if manifest["kind"] == "LeaderWorkerSet":
            # Of it only its pods; the rest is there too.
            found = [{"apiVersion": "v1", "kind": "Pod"} | pod for pod in pods([manifest])]
        for one in found:
            kubernetes_validate.validate(one, f"1.{minor}", strict=True)
            kinds.add(one["kind"])
    assert kinds == {
        "ConfigMap", "Deployment", "HorizontalPodAutoscaler", "Ingress", "Job", "NetworkPolicy",
        "PersistentVolumeClaim", "Pod", "PodDisruptionBudget", "Service", "ServiceAccount",
    }  # fmt: skip


def test_custom_resources_fit_the_release() -> None:
    manifests = render(FULL)
    (service,), (deployment,) = of_kind(manifests, "Service"), of_kind(manifests, "Deployment")
    (scaled,) = of_kind(manifests, "ScaledObject")
    assert scaled["apiVersion"] == "keda.sh/v1alpha1"
    assert scaled["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    (trigger,) = scaled["spec"]["triggers"]
    assert (trigger["type"], trigger["metricType"]) == ("prometheus", "AverageValue")
    assert trigger["metadata"] == {
        "serverAddress": "http://prometheus.monitoring:9090",
        "query": 'sum(vllm:num_requests_waiting{namespace="llm",'
        'pod=~"demo-sliceserve-[^-]+-[^-]+",model_name="llama-2-70b"})',
        "threshold": "5",
    }
    assert "replicas" not in deployment["spec"]
    slowly = {"scaleDown": {"stabilizationWindowSeconds": 600}}
    assert scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == slowly
    (route,) = of_kind(manifests, "HTTPRoute")
    (rule,) = route["spec"]["rules"]
    assert rule["timeouts"] == {"request": "3600s"}
    (port,) = service["spec"]["ports"]
    assert rule["backendRefs"] == [{"name": service["metadata"]["name"], "port": port["port"]}]
    (monitor,) = of_kind(manifests, "ServiceMonitor")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert [endpoint["port"] for endpoint in monitor["spec"]["endpoints"]] == [port["name"]]
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    assert wanted <= service["metadata"]["labels"].items()
    manifests = render(HPA)
    (monitor,) = of_kind(manifests, "PodMonitor")
    labels = server_pod(FULL)["metadata"]["labels"].items()
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels
    assert monitor["spec"]["podMetricsEndpoints"][0]["port"] == "http"
    (scaler,) = of_kind(manifests, "HorizontalPodAutoscaler")
    assert scaler["spec"]["behavior"] == slowly
    (metric,) = scaler["spec"]["metrics"]
    assert metric["pods"]["metric"]["selector"] == {"matchLabels": {"model_name": "llama"}}
    (scaler,) = of_kind(
        render(with_values(HPA, "model.servedName", "owner/name")), "HorizontalPodAutoscaler"
    )
    assert "selector" not in scaler["spec"]["metrics"][0]["pods"]["metric"], "a label has no slash"


def objects(values: dict[str, Any], path: str = "") -> Iterator[str]:
    """The paths of the chart's own objects; the free ones are those of Kubernetes."""
    free = ("requests", "limits", "nodeSelector", "affinity", "annotations", "podAnnotations",
            "labels")  # fmt: skip
    yield path
    for name, value in values.items():
        if isinstance(value, dict) and name not in free:
            yield from objects(value, f"{path}.{name}".strip("."))


@pytest.mark.parametrize(
    "path", sorted(objects(yaml.safe_load((CHART / "values.yaml").read_text())))
)
def test_a_typo_is_refused(path: str) -> None:
    values = with_values(HUB, f"{path}.typpo".strip("."), 1)
    with pytest.raises(HelmError, match="typpo"):
        render(values)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("slice.fraction", 1),
        ("slice.fraction", "a quarter"),
        ("slice.fraction", "1.0"),
        ("slice.targetParams", "1.5"),
        ("monitoring.rules.ttftSeconds", 8.5),
        ("monitoring.rules.ttftSeconds", "8.5"),
        ("monitoring.rules.errorRatio", "5%"),
        ("monitoring.rules.regression", "0.9"),
        ("server.replicas", -1),
        ("server.updateStrategy", "OnDelete"),
        ("slice.extraEnv", [{"value": "unnamed"}]),
        ("server.tensorParallelSize", 1.5),
        ("autoscaling.kind", "vpa"),
        ("image.digest", "latest"),
        ("checkpoints.size", "200 GB"),
        ("model.hub", "name"),
        ("model.revision", "--restart"),
        ("model.revision", "two words"),
        ("model.revision", 1),
        ("podSecurity.user", 0),
        ("podSecurity.user", "root"),
        ("service.annotations", {"internal": True}),
        ("server.podAnnotations", {"count": 1}),
        ("httpRoute.requestTimeout", "an hour"),
    ],
)
def test_impossible_values_are_refused(path: str, value: Any) -> None:
    with pytest.raises(HelmError, match=path.rsplit(".", 1)[1]):
        render(with_values(HUB, path, value))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "name one model: .* not 0"),
        ({"model": {"hub": "a/b", "claim": {"name": "c"}}}, "name one model: .* not 2"),
        ({"model": {"claim": {"name": "c"}, "revision": "v1"}}, "model.revision needs model.hub"),
        (HUB | {"server": {"replicas": 2}}, "set checkpoints.accessMode to ReadWriteMany"),
        (HUB | {"server": {"nodes": 2}}, "claim that is there cannot be changed, so name another"),
        (
            NODES | {"server": {"nodes": 3, "tensorParallelSize": 4}},
            "server.nodes is 3, which does not divide .* = 4",
        ),
        (HUB | {"ingress": {"enabled": True}}, "ingress.enabled needs ingress.host"),
        (HUB | {"httpRoute": {"enabled": True}}, "httpRoute.enabled needs httpRoute.parentRefs"),
        (
            HUB | {"autoscaling": {"kind": "keda"}, "checkpoints": {"existingClaim": "c"}},
            "needs autoscaling.prometheusAddress",
        ),
        (
            HPA | {"autoscaling": {"kind": "hpa", "minReplicas": 5, "maxReplicas": 4}},
            "autoscaling.minReplicas is 5, more than autoscaling.maxReplicas = 4",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(HelmError, match=message):
        render(values)


# The standard allows image volumes from 1.33 on.
VOLUMES = {"1.28.0": {"persistentVolumeClaim", "emptyDir", "secret"}}
VOLUMES["1.33.0"] = VOLUMES["1.28.0"] | {"image"}


@pytest.mark.parametrize(
    ("path", "version"),
    [
        pytest.param(path, version, id=f"{path.name.removesuffix('-values.yaml')}-{version}")
        for path in SCENARIOS
        for version in VOLUMES
        if path.name != "oci-values.yaml" or version == "1.33.0"
    ],
)
def test_pods_pass_the_restricted_standard(path: Path, version: str) -> None:
    """The rules of the "restricted" pod security standard, and what the chart promises beyond."""
    found = list(pods(render(scenario(path), version)))
    assert len(found) == (4 if path.name == "nodes-values.yaml" else 3)
    for pod in found:
        spec = pod["spec"]
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        kinds = {kind for volume in spec.get("volumes", []) for kind in volume.keys() - {"name"}}
        assert kinds <= VOLUMES[version]
        for container in spec["containers"] + spec.get("initContainers", []):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounts <= {volume["name"] for volume in spec.get("volumes", [])}


def test_parallel_sizes_drive_gpus_and_shared_memory() -> None:
    spec = server_pod(FULL)["spec"]
    (server,) = spec["containers"]
    assert server["resources"]["limits"]["nvidia.com/gpu"] == "8"
    (memory,) = [v for v in spec["volumes"] if v["name"] == "shared-memory"]
    assert memory["emptyDir"] == {"medium": "Memory", "sizeLimit": "8192Mi"}
    on_cpu = server_pod(scenario(CHART / "ci" / "cpu-values.yaml"))["spec"]["containers"][0]
    assert on_cpu["resources"]["limits"] == {"memory": "64Gi"}


def test_several_nodes_are_one_group() -> None:
    """A LeaderWorkerSet: the leader serves with vLLM's Ray back end, workers join its Ray."""
    manifests = render(NODES)
    (group,) = of_kind(manifests, "LeaderWorkerSet")
    assert group["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    template = group["spec"]["leaderWorkerTemplate"]
    assert template["size"] == 2
    (leader,) = template["leaderTemplate"]["spec"]["containers"]
    (worker,) = template["workerTemplate"]["spec"]["containers"]
    for container in (leader, worker):
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "4"
        assert {"name": "checkpoints", "mountPath": "/checkpoints", "readOnly": True} in container[
            "volumeMounts"
        ]
        assert "VLLM_HOST_IP" in {entry["name"] for entry in container["env"]}
    args, settings = parse_arguments(make_parser(), [leader["command"][3], *leader["args"]])
    assert args.distributed_executor_backend == "ray"
    assert args.tensor_parallel_size * args.pipeline_parallel_size == 2 * 4
    port = re.search(r"--head --port=(\d+)", leader["command"][2])
    assert port
    assert worker["command"][3] == f"$(LWS_LEADER_ADDRESS):{port[1]}"
    assert "readinessProbe" in leader
    assert "readinessProbe" not in worker
    waits = int(worker["lifecycle"]["preStop"]["exec"]["command"][1])
    assert waits >= settings.drain_timeout
    assert template["workerTemplate"]["spec"]["terminationGracePeriodSeconds"] > waits
    (scaled,) = of_kind(manifests, "ScaledObject")
    target = {key: group[key] for key in ("apiVersion", "kind")} | {
        "name": group["metadata"]["name"]
    }
    assert scaled["spec"]["scaleTargetRef"] == target
    assert "replicas" not in group["spec"]
    (by_hand,) = of_kind(render(with_values(NODES, "autoscaling.kind", "none")), "LeaderWorkerSet")
    assert by_hand["spec"]["replicas"] == 2


def test_the_nodes_of_a_group_reach_each_other() -> None:
    (policy,) = [
        policy
        for policy in of_kind(render(NODES), "NetworkPolicy")
        if policy["metadata"]["name"].endswith("-nodes")
    ]
    spec = policy["spec"]
    (component,) = spec["podSelector"]["matchExpressions"]
    parts = {
        pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in pods(render(NODES))
    }
    assert set(component["values"]) == {"server", "worker"} <= parts
    assert spec["ingress"] == [{"from": [{"podSelector": spec["podSelector"]}]}]
    assert spec["egress"] == [{"to": [{"podSelector": spec["podSelector"]}]}]
    names = {policy["metadata"]["name"] for policy in of_kind(render(FULL), "NetworkPolicy")}
    assert policy["metadata"]["name"] not in names


def test_the_grace_period_covers_the_drain() -> None:
    values = with_values(HUB, "server.drainTimeoutSeconds", 300)
    spec = server_pod(with_values(values, "server.preStopSeconds", 20))["spec"]
    assert "--drain-timeout=300" in spec["containers"][0]["args"]
    assert spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "20"]
    assert spec["terminationGracePeriodSeconds"] >= 320


def test_a_rolling_update_never_goes_below_capacity() -> None:
    (deployment,) = of_kind(render(FULL), "Deployment")
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    values = with_values(FULL, "server.updateStrategy", "Recreate")
    (deployment,) = of_kind(render(values), "Deployment")
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}, "Kubernetes takes no more"


@pytest.mark.parametrize("path", SCENARIOS, **ids)
def test_selectors_find_their_pods_and_no_others(path: Path) -> None:
    manifests = render(scenario(path))
    labels = [pod["metadata"]["labels"] for pod in pods(manifests)]
    parts = {entry["app.kubernetes.io/component"]: entry for entry in labels}
    assert parts.keys() - {"worker"} == {"server", "slice", "test"}
    (budget,) = of_kind(manifests, "PodDisruptionBudget")
    (service,) = of_kind(manifests, "Service")
    guarded = {part for part, found in parts.items() if selects(budget["spec"]["selector"], found)}
    assert guarded == parts.keys() & {"server", "worker"}, "a worker takes its group with it"
    selectors = [service["spec"]["selector"]]
    for deployment in of_kind(manifests, "Deployment"):
        selectors.append(deployment["spec"]["selector"]["matchLabels"])
    for selector in selectors:
        matching = [part for part, found in parts.items() if selector.items() <= found.items()]
        assert matching == ["server"]


def egress_ports(values: dict[str, Any], component: str) -> set[int]:
    """Ports to which the policies let a pod connect, wherever to."""
    policies = of_kind(render(values), "NetworkPolicy")
    labels = {"app.kubernetes.io/name": "sliceserve", "app.kubernetes.io/instance": "demo",
              "app.kubernetes.io/component": component}  # fmt: skip
    return {
        port["port"]
        for policy in policies
        if selects(policy["spec"]["podSelector"], labels)
        for rule in policy["spec"].get("egress", [])
        for port in rule.get("ports", [])
    }


def test_only_a_job_that_downloads_reaches_the_internet() -> None:
    assert egress_ports(FULL, "server") == {53}
    assert egress_ports(FULL, "slice") == {53, 443}
    assert egress_ports(FULL, "test") == {53, 8000}
    claim = {"model": {"claim": {"name": "models", "path": "llama"}}}
    assert egress_ports(claim, "slice") == {53}
    proxy = [{"ports": [{"port": 3128}]}]
    to_proxy = with_values(claim, "networkPolicy.jobEgress", proxy)
    assert egress_ports(to_proxy, "slice") == {53, 3128}
    assert egress_ports(to_proxy, "server") == {53}
    to_proxy = with_values(claim, "networkPolicy.serverEgress", proxy)
    assert egress_ports(to_proxy, "slice") == {53}
    assert egress_ports(to_proxy, "server") == {53, 3128}
    for component in ("server", "worker"):
        assert egress_ports(NODES, component) == {53, 4317}
    assert egress_ports(NODES, "slice") == {53, 443, 3128}
    assert egress_ports(NODES, "test") == {53, 8000}


def test_no_service_has_the_name_of_a_group() -> None:
    """Its controller makes a headless service of that name only if there is none."""
    manifests = render(NODES)
    (group,) = of_kind(manifests, "LeaderWorkerSet")
    services = {service["metadata"]["name"] for service in of_kind(manifests, "Service")}
    assert services
    assert group["metadata"]["name"] not in services
    assert f"leaderworkerset/{group['metadata']['name']} " in render_files(NODES)[NOTES]


def test_the_operators_environment_comes_last() -> None:
    found = list(pods(render(NODES)))
    names = {"server": "NCCL_SOCKET_IFNAME", "worker": "NCCL_SOCKET_IFNAME", "slice": "HTTPS_PROXY"}
    for pod in found:
        component = pod["metadata"]["labels"]["app.kubernetes.io/component"]
        (container,) = pod["spec"]["containers"]
        if component in names:
            assert container["env"][-1]["name"] == names[component]
    values = with_values(
        scenario(CHART / "ci" / "cpu-values.yaml"), "slice.extraEnv", [{"name": "A"}]
    )
    (download,) = slicing_job(values)["spec"]["template"]["spec"]["initContainers"]
    assert download["env"][-1] == {"name": "A"}


def test_both_accounts_are_annotated() -> None:
    accounts = of_kind(render(NODES), "ServiceAccount")
    assert len(accounts) == 2
    for account in accounts:
        assert account["metadata"]["annotations"] == NODES["serviceAccounts"]["annotations"]


@pytest.mark.parametrize("values", [FULL, NODES], ids=["deployment", "group"])
def test_another_chart_alone_loads_no_model_anew(values: dict[str, Any], tmp_path: Path) -> None:
    """Whoever names an image is not given another by a chart's version."""
    newer = shutil.copytree(CHART, tmp_path / "chart")
    text = (newer / "Chart.yaml").read_text()
    (newer / "Chart.yaml").write_text(text.replace("ersion: 0.1.0", "ersion: 0.2.0"))
    values = with_values(values, "image.tag", "mine")
    before, after = (list(pods(render(values, chart=chart))) for chart in (CHART, newer))
    without_test = [[pod for pod in found if "kind" not in pod] for found in (before, after)]
    assert len(without_test[0]) >= 2
    assert without_test[0] == without_test[1]
