"""The chart under a real Helm: every scenario rendered and checked against Kubernetes' schemas."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml
from helm_python import HelmError
from helm_render import (
    CHART,
    REPOSITORY,
    SCENARIOS,
    Manifest,
    of_kind,
    render,
    render_files,
    scenario,
)

from sliceserve.server.serve import make_parser, parse_arguments
from sliceserve.slicing.checkpoint import read_checkpoint_summary

NEWEST = int(kubernetes_validate.latest_version().split(".")[1])
FULL = scenario(CHART / "ci" / "full-values.yaml")
NODES = scenario(CHART / "ci" / "nodes-values.yaml")
HPA = scenario(CHART / "ci" / "hpa-values.yaml")
NOTES = "sliceserve/templates/NOTES.txt"
PAPER = "--rotation dense --basis pca --refit none"
HUB: dict[str, Any] = {"model": {"hub": "owner/name"}}
ids = {"ids": lambda path: path.name.removesuffix("-values.yaml")}


def with_values(base: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of values with one of them changed."""
    copy: dict[str, Any] = json.loads(json.dumps(base))
    *parents, last = path.split(".")
    place = copy
    for name in parents:
        place = place.setdefault(name, {})
    place[last] = value
    return copy


def pods(manifests: list[Manifest]) -> Iterator[Manifest]:
    """Metadata and spec of every pod of a release."""
    for manifest in manifests:
        if manifest["kind"] == "Pod":
            yield manifest
        elif manifest["kind"] in ("Job", "Deployment"):
            yield manifest["spec"]["template"]
        elif manifest["kind"] == "LeaderWorkerSet":
            group = manifest["spec"]["leaderWorkerTemplate"]
            yield from (group["leaderTemplate"], group["workerTemplate"])


def server_pod(values: dict[str, Any]) -> Manifest:
    (deployment,) = of_kind(render(values), "Deployment")
    template: Manifest = deployment["spec"]["template"]
    return template


def slicing_job(values: dict[str, Any]) -> Manifest:
    (job,) = of_kind(render(values), "Job")
    return job


def output_of(job: Manifest) -> str:
    directory: str = job["spec"]["template"]["spec"]["containers"][0]["command"][3]
    return directory


def without_values(spec: Manifest) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in spec["env"] if "value" in entry}


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
        if group in (
            "monitoring.coreos.com", "keda.sh", "gateway.networking.k8s.io",
            "leaderworkerset.x-k8s.io",
        ):  # fmt: skip
            continue  # tested below: `..._custom_resources_...` and `..._several_nodes_...`
        kubernetes_validate.validate(manifest, f"1.{minor}", strict=True)
        kinds.add(manifest["kind"])
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
        "query": 'sum(vllm:num_requests_waiting{namespace="llm",model_name="llama-2-70b"})',
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
    free = ("requests", "limits", "nodeSelector", "affinity", "annotations", "labels")
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
        ("podSecurity.user", 0),
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
        (HUB | {"server": {"replicas": 2}}, "set checkpoints.accessMode to ReadWriteMany"),
        (HUB | {"server": {"nodes": 2}}, "set checkpoints.accessMode to ReadWriteMany"),
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
        (
            with_values(NODES, "server.updateStrategy", "Recreate"),
            "server.updateStrategy Recreate is for a Deployment",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(HelmError, match=message):
        render(values)


@pytest.mark.parametrize("path", SCENARIOS, **ids)
def test_pods_pass_the_restricted_standard(path: Path) -> None:
    """The rules of the "restricted" pod security standard, and what the chart promises beyond."""
    found = list(pods(render(scenario(path))))
    assert len(found) == (4 if path.name == "nodes-values.yaml" else 3)
    for pod in found:
        spec = pod["spec"]
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        kinds = {kind for volume in spec.get("volumes", []) for kind in volume.keys() - {"name"}}
        assert kinds <= {"persistentVolumeClaim", "emptyDir", "secret", "image"}
        for container in spec["containers"] + spec.get("initContainers", []):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounts <= {volume["name"] for volume in spec.get("volumes", [])}


@pytest.mark.parametrize("path", SCENARIOS, **ids)
def test_secrets_are_named_and_never_made(path: Path) -> None:
    manifests = render(scenario(path))
    assert of_kind(manifests, "Secret") == []
    for pod in pods(manifests):
        for container in pod["spec"]["containers"]:
            values = without_values({"env": container.get("env", [])})
            assert not values.keys() & {"HF_TOKEN", "API_KEY", "SLICESERVE_API_KEY"}


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


def test_a_job_slices_to_a_size_or_by_a_fraction() -> None:
    (container,) = slicing_job(NODES)["spec"]["template"]["spec"]["containers"]
    assert container["args"][1:3] == ["--target-params", "0.75"]
    assert slicing_job(NODES)["spec"]["template"]["spec"]["priorityClassName"] == "batch"
    (container,) = slicing_job(HUB)["spec"]["template"]["spec"]["containers"]
    assert container["args"][1:3] == ["--fraction", "0.25"]
    assert output_of(slicing_job(NODES)) != output_of(
        slicing_job(with_values(NODES, "slice.targetParams", 0))
    )


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
    selectors = [budget["spec"]["selector"]["matchLabels"], service["spec"]["selector"]]
    for deployment in of_kind(manifests, "Deployment"):
        selectors.append(deployment["spec"]["selector"]["matchLabels"])
    for selector in selectors:
        matching = [part for part, found in parts.items() if selector.items() <= found.items()]
        assert matching == ["server"]


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    """Whether a selector of the chart's finds a pod."""
    return selector["matchLabels"].items() <= labels.items() and all(
        labels.get(wanted["key"]) in wanted["values"]
        for wanted in selector.get("matchExpressions", [])
    )


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
    for component in ("server", "worker"):
        assert egress_ports(NODES, component) == {53, 3128}
    assert egress_ports(NODES, "slice") == {53, 443, 3128}
    assert egress_ports(NODES, "test") == {53, 8000}


def test_a_job_is_another_when_anything_in_it_is() -> None:
    """Kubernetes refuses to change a Job; its output is the same as long as the slice is."""
    first = slicing_job(HUB)
    newer_image = slicing_job(with_values(HUB, "image.tag", "0.2.0"))
    assert newer_image["metadata"]["name"] != first["metadata"]["name"]
    assert output_of(newer_image) == output_of(first)
    renamed = slicing_job(with_values(HUB, "server.maxModelLen", 1024))
    assert renamed == first
    for path, value in (
        ("slice.gpus", 1), ("slice.runtimeClassName", "nvidia"), ("server.replicas", 0),
        ("slice.affinity", {"nodeAffinity": {}}), ("slice.extraEnv", [{"name": "A"}]),
        ("model.hubToken.existingSecret", "token"), ("slice.backoffLimit", 7),
    ):  # fmt: skip
        other = slicing_job(with_values(HUB, path, value))
        assert other["metadata"]["name"] != first["metadata"]["name"], path
        assert output_of(other) == output_of(first), path
    more = slicing_job(with_values(HUB, "slice.fraction", 0.3))
    assert output_of(more) != output_of(first)
    (server,) = server_pod(with_values(HUB, "slice.fraction", 0.3))["spec"]["containers"]
    assert server["command"] == ["sliceserve", "serve", output_of(more)]


def test_a_slice_is_known_by_what_its_download_is_asked_for() -> None:
    values = scenario(CHART / "ci" / "cpu-values.yaml")
    directory = output_of(slicing_job(values))
    for path, value in (("image", "other:2"), ("existingSecret", "other"), ("size", "300Gi")):
        changed = with_values(values, f"model.download.{path}", value)
        assert output_of(slicing_job(changed)) == directory, path
    for path, words in (("command", ["sh"]), ("args", ["another"])):
        changed = with_values(values, f"model.download.{path}", words)
        assert output_of(slicing_job(changed)) != directory, path


@pytest.mark.parametrize("path", ["slice.targetParams", "slice.fraction"])
def test_a_number_that_helm_made_a_string_is_that_number(path: str) -> None:
    number, text, zero = (
        slicing_job(with_values(HUB, path, value)) for value in (0.75, "0.75", "0")
    )
    assert output_of(number) == output_of(text)
    assert number == text
    assert output_of(zero) == output_of(slicing_job(with_values(HUB, path, 0)))
    expected = "0.25" if path == "slice.targetParams" else "0"
    assert zero["spec"]["template"]["spec"]["containers"][0]["args"][1:3] == [
        "--fraction", expected,
    ]  # fmt: skip
    assert "--fraction 0.25" in render_files(with_values(HUB, "slice.targetParams", "0"))[NOTES]


def test_a_job_says_where_it_slices() -> None:
    for values, device, classes in (
        (HUB, "cpu", (None, "nvidia")),
        (with_values(HUB, "slice.gpus", 2), "cuda", ("nvidia", "nvidia")),
        (with_values(HUB | {"server": {"gpuResource": ""}}, "slice.gpus", 2), "cpu", None),
    ):
        spec = slicing_job(values)["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        assert container["args"][3:5] == ["--device", device]
        limits = container["resources"]["limits"]
        assert limits.get("nvidia.com/gpu") == ("2" if device == "cuda" else None)
        if classes:
            of_server = with_values(values, "server.runtimeClassName", "nvidia")
            own = with_values(values, "slice.runtimeClassName", "nvidia")
            found = [slicing_job(v)["spec"]["template"]["spec"] for v in (of_server, own)]
            assert tuple(spec.get("runtimeClassName") for spec in found) == classes


def test_what_shares_a_volume_of_one_node_runs_on_it() -> None:
    """A ReadWriteOnce volume; the Job follows the server, whose pods follow each other."""
    server, job = server_pod(HUB), slicing_job(HUB)["spec"]["template"]
    for pod in (server, job):
        affinity = pod["spec"]["affinity"].pop("podAffinity")
        (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
        assert term["topologyKey"] == "kubernetes.io/hostname"
        assert selects(term["labelSelector"], server["metadata"]["labels"])
        assert not selects(term["labelSelector"], job["metadata"]["labels"])
        assert pod["spec"]["affinity"] == {}
    for free in (FULL, NODES, HPA):
        assert all(
            "podAffinity" not in pod["spec"].get("affinity", {}) for pod in pods(render(free))
        )
    alone = slicing_job(with_values(HUB, "server.replicas", 0))["spec"]["template"]["spec"]
    assert "affinity" not in alone, "or nobody would have a node"
    mine: dict[str, Any] = {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}}
    values = with_values(with_values(HUB, "server.affinity", mine), "slice.affinity", mine)
    assert server_pod(values)["spec"]["affinity"] == mine
    assert slicing_job(values)["spec"]["template"]["spec"]["affinity"] == mine
    beside: dict[str, Any] = {"nodeAffinity": {}}
    both = server_pod(with_values(HUB, "server.affinity", beside))["spec"]["affinity"]
    assert both.keys() == {"nodeAffinity", "podAffinity"}


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
    assert download["env"] == [{"name": "A"}]


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


def test_failed_tries_stay_and_ray_has_room() -> None:
    assert slicing_job(HUB)["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    # A download goes with its pod.
    downloads = slicing_job({"model": {"download": {"image": "tool:1"}}})
    assert downloads["spec"]["template"]["spec"]["restartPolicy"] == "OnFailure"
    sizes = {
        pod["metadata"]["labels"]["app.kubernetes.io/component"]: volume["emptyDir"]["sizeLimit"]
        for pod in pods(render(NODES))
        for volume in pod["spec"].get("volumes", [])
        if volume["name"] == "tmp"
    }
    assert sizes == {"server": "10Gi", "worker": "10Gi", "slice": "10Gi"}


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


def test_the_job_slices_once_and_for_all(tiny: Path, tmp_path: Path) -> None:
    """The rendered command, run here with the claim's directory moved."""
    values = {
        "model": {"claim": {"name": "models", "path": "tiny"}},
        "slice": {"gpus": 0, "extraArgs": f"--samples 4 --sequence-length 32 {PAPER}".split()},
    }
    (container,) = slicing_job(values)["spec"]["template"]["spec"]["containers"]
    moved = [
        word.replace("/checkpoints", str(tmp_path)).replace("/model/tiny", str(tiny))
        for word in container["command"] + container["args"]
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    outputs = [
        subprocess.run(
            moved, capture_output=True, text=True, check=True, env=os.environ | {"PATH": path}
        ).stdout
        for _ in range(2)
    ]
    (directory,) = tmp_path.iterdir()
    summary = read_checkpoint_summary(directory)
    assert summary.slicing.widths[0] == 72
    assert str(summary.sliced_parameters)[:3] in outputs[0].replace(",", "")
    assert outputs[1] == f"{directory} is there already\n"


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
