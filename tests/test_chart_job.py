"""The chart's Job: when it is another, what it is told, where it runs, and that it slices."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helm_render import (
    CHART,
    FULL,
    HPA,
    HUB,
    NODES,
    NOTES,
    output_of,
    pods,
    render,
    render_files,
    scenario,
    selects,
    server_pod,
    slicing_job,
    with_values,
)

from sliceserve.slicing.arguments import make_parser
from sliceserve.slicing.checkpoint import read_checkpoint_summary

OCI = scenario(CHART / "ci" / "oci-values.yaml")
PAPER = "--rotation dense --basis pca --refit none"


def test_a_job_slices_to_a_size_or_by_a_fraction() -> None:
    (container,) = slicing_job(NODES)["spec"]["template"]["spec"]["containers"]
    assert container["args"][1:3] == ["--target-params", "0.75"]
    assert slicing_job(NODES)["spec"]["template"]["spec"]["priorityClassName"] == "batch"
    (container,) = slicing_job(HUB)["spec"]["template"]["spec"]["containers"]
    assert container["args"][1:3] == ["--fraction", "0.25"]
    assert output_of(slicing_job(NODES)) != output_of(
        slicing_job(with_values(NODES, "slice.targetParams", 0))
    )


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
        ("slice.podAnnotations", {"a": "b"}),
    ):  # fmt: skip
        other = slicing_job(with_values(HUB, path, value))
        assert other["metadata"]["name"] != first["metadata"]["name"], path
        assert output_of(other) == output_of(first), path
    more = slicing_job(with_values(HUB, "slice.fraction", 0.3))
    assert output_of(more) != output_of(first)
    (server,) = server_pod(with_values(HUB, "slice.fraction", 0.3))["spec"]["containers"]
    assert server["command"] == ["sliceserve", "serve", output_of(more)]


def test_a_revision_is_asked_for_and_makes_another_slice() -> None:
    values = scenario(CHART / "ci" / "hub-values.yaml")
    revision = values["model"]["revision"]
    (container,) = slicing_job(values)["spec"]["template"]["spec"]["containers"]
    _, *words = container["args"]
    options = make_parser().parse_args(["slice", values["model"]["hub"], *words, "--output", "o"])
    assert options.revision == revision
    (line,) = re.findall(r"^ *sliceserve (plan .*)$", render_files(values)[NOTES], re.MULTILINE)
    assert make_parser().parse_args(shlex.split(line)).revision == revision
    found = [
        output_of(slicing_job(with_values(values, "model.revision", other)))
        for other in (revision, "v1", "")
    ]
    assert len(set(found)) == 3
    without = {"model": {"hub": values["model"]["hub"]}}
    assert output_of(slicing_job(without)) == found[2]
    assert "--revision" not in json.dumps(slicing_job(without))


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


def test_an_eviction_is_no_failure_and_a_bad_value_is_no_case_for_another_try() -> None:
    evicted = {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    for values in (HUB, HPA, OCI):
        spec = slicing_job(values)["spec"]
        # The first rule that matches counts.
        first, rule = spec["podFailurePolicy"]["rules"]
        assert first == evicted
        assert rule["action"] == "FailJob"
        names = [found["name"] for found in spec["template"]["spec"]["containers"]]
        assert names == [rule["onExitCodes"]["containerName"]]
        assert not rule["onPodConditions"], "Kubernetes takes one of both"
        assert spec["template"]["spec"]["restartPolicy"] == "Never", "or Kubernetes refuses it"
    downloads = slicing_job({"model": {"download": {"image": "tool:1"}}})
    assert "podFailurePolicy" not in downloads["spec"]


def test_a_download_is_told_what_to_get_and_has_a_home_and_the_jobs_resources() -> None:
    values: dict[str, Any] = {
        "model": {"download": {"image": "tool:1", "args": ["a model", "/model"]}},
        "slice": {"gpus": 1, "resources": {"requests": {"cpu": "2"}, "limits": {"memory": "9Gi"}}},
    }
    spec = slicing_job(values)["spec"]["template"]["spec"]
    (download,), (slicer,) = spec["initContainers"], spec["containers"]
    assert download["args"] == ["a model", "/model"]
    assert "command" not in download, "the image's own entrypoint"
    limits = slicer["resources"]["limits"]
    assert limits.pop("nvidia.com/gpu") == "1", "the download has none"
    assert limits == {"memory": "9Gi"}
    assert download["resources"] == slicer["resources"]
    assert download["resources"]["requests"]["cpu"] == "2"
    # A read-only root has no other place.
    assert download["securityContext"]["readOnlyRootFilesystem"]
    (home,) = (entry["value"] for entry in download["env"] if entry["name"] == "HOME")
    (place,) = (found for found in download["volumeMounts"] if found["mountPath"] == home)
    assert not place.get("readOnly")


@pytest.mark.parametrize("there", [False, True])
def test_a_download_is_spared_where_the_job_finds_its_slice(there: bool, tmp_path: Path) -> None:
    """The rendered command, run here; the Job asks the same of the same directory."""
    # A shell would take them apart.
    tool, *words = ["touch", "--", "a  'b' $0", "-c", "$HOME"]
    download = {"image": "tool:1", "command": [tool, *words[:2]], "args": words[2:]}
    spec = slicing_job({"model": {"download": download}})["spec"]["template"]["spec"]
    (first,) = spec["initContainers"]
    mounts = {mount["mountPath"]: mount for mount in first["volumeMounts"]}
    assert mounts["/checkpoints"] == {
        "name": "checkpoints", "mountPath": "/checkpoints", "readOnly": True,
    }  # fmt: skip
    claim, model = tmp_path / "claim", tmp_path / "model"
    for directory in (claim, model):
        directory.mkdir()
    places = {"/checkpoints": str(claim), "/model": str(model)}
    directory = claim / Path(output_of({"spec": {"template": {"spec": spec}}})).name
    (directory if there else directory.with_name(f".{directory.name}.partial")).mkdir()
    done = run_here(first, places, cwd=model)
    assert done.returncode == 0, done.stderr
    said = f"{directory} is there already\n"
    assert done.stdout == (said if there else "")
    assert {path.name for path in model.iterdir()} == (set() if there else set(words[1:]))
    (looked_for,) = (e["value"] for e in first["env"] if e["name"] == "SLICE_DIRECTORY")
    assert Path(looked_for) == Path("/checkpoints") / directory.name


@pytest.mark.parametrize(
    ("slicing", "sentence"),
    [
        ({"extraArgs": ["--sampels", "4"]}, "--sampels"),
        ({"extraArgs": ["--rotation", "sparse"]}, "'sparse'"),
        ({}, "MODEL '/model/llama' does not exist"),
    ],
)
def test_what_cannot_be_used_ends_with_the_code_that_ends_the_job(
    slicing: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    job = slicing_job(HPA | {"slice": slicing})
    (container,) = job["spec"]["template"]["spec"]["containers"]
    done = run_here(container, {"/checkpoints": str(tmp_path)})
    assert sentence in done.stderr
    _, rule = job["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["operator"] == "In"
    assert done.returncode in rule["onExitCodes"]["values"]
    assert not any(tmp_path.iterdir())


def test_a_hub_out_of_reach_is_tried_again(tmp_path: Path) -> None:
    job = slicing_job(HUB)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    done = run_here(container, {"/checkpoints": str(tmp_path)}, HF_HUB_OFFLINE="1")
    assert "MODEL 'owner/name' is no directory here and the hub did not give it" in done.stderr
    _, rule = job["spec"]["podFailurePolicy"]["rules"]
    assert done.returncode == 1
    assert done.returncode not in rule["onExitCodes"]["values"]


def run_here(
    container: dict[str, Any],
    places: dict[str, str],
    cwd: Path | None = None,
    **environment: str,
) -> "subprocess.CompletedProcess[str]":
    """A container's command with its paths replaced by those here."""
    words = container["command"] + container["args"]
    for before, after in places.items():
        words = [word.replace(before, after) for word in words]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PATH": path} | environment,
        check=False,
    )


def test_the_job_slices_once_and_for_all(tiny: Path, tmp_path: Path) -> None:
    """The rendered command, run here with the claim's directory moved."""
    values = {
        "model": {"claim": {"name": "models", "path": "tiny"}},
        "slice": {"gpus": 0, "extraArgs": f"--samples 4 --sequence-length 32 {PAPER}".split()},
    }
    (container,) = slicing_job(values)["spec"]["template"]["spec"]["containers"]
    places = {"/checkpoints": str(tmp_path), "/model/tiny": str(tiny)}
    runs = [run_here(container, places) for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0], runs
    outputs = [run.stdout for run in runs]
    (directory,) = tmp_path.iterdir()
    summary = read_checkpoint_summary(directory)
    assert summary.slicing.widths[0] == 72
    assert str(summary.sliced_parameters)[:3] in outputs[0].replace(",", "")
    assert outputs[1] == f"{directory} is there already\n"
