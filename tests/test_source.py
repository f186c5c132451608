"""Where a model comes from: paths, and a hub that answers, refuses or is silent."""

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config
from local_hub import NAME, Hub, serving_hub, use_hub

from sliceserve.slicing.cli import main
from sliceserve.slicing.errors import MachineError, UserError
from sliceserve.slicing.job import PAPER, SliceOptions, run_slice
from sliceserve.slicing.progress import Progress
from sliceserve.slicing.report import describe
from sliceserve.slicing.source import locate, locate_all

OLD, NEW = "0123456789abcdef" * 2 + "01234567", "f" * 40
SMALL: dict[str, Any] = {"fraction": 0.3, "samples": 4, "sequence_length": 32} | PAPER
PLAN = ["plan", NAME, "--gpu-memory", "1GiB", "--json"]


@pytest.fixture
def hub(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Two commits of the tiny model; what the newer one's config says of positions is another."""
    newer = Path(shutil.copytree(tiny, tmp_path / "newer"))
    fields = json.loads((newer / "config.json").read_text())
    (newer / "config.json").write_text(json.dumps(fields | {"max_position_embeddings": 99}))
    commits = {OLD: tiny, NEW: newer}
    served = Hub(commits, {"main": NEW, "v1": OLD, "refs/pr/1": OLD})
    with serving_hub(served, tmp_path / "cache", monkeypatch):
        yield served


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, NEW), ("main", NEW), ("v1", OLD), (OLD, OLD)]
)
def test_a_revision_is_what_is_fetched(revision: str | None, commit: str, hub: Hub) -> None:
    location = locate(NAME, revision=revision)
    assert location.commit == commit
    for file in hub.commits[commit].iterdir():
        assert (location.directory / file.name).read_bytes() == file.read_bytes()
    assert {found for found, _ in hub.fetched} == {commit}


def test_what_was_fetched_serves_while_the_hub_is_silent(hub: Hub) -> None:
    first = locate(NAME, revision="v1")
    hub.refusal = (503, "")
    assert locate(NAME, revision="v1") == first
    with pytest.raises(MachineError, match="at --revision 'main' is no directory here and the hub"):
        locate(NAME, revision="main")


@pytest.mark.parametrize(
    ("refusal", "code"),
    [
        ((404, "RepoNotFound"), 2),
        ((401, "RepoNotFound"), 2),
        ((403, "GatedRepo"), 2),
        ((403, ""), 2),
        ((404, "RevisionNotFound"), 2),
        ((408, ""), 1),
        ((429, ""), 1),
        ((500, ""), 1),
        ((503, ""), 1),
    ],
)
def test_a_refusal_is_the_users_and_silence_is_not(
    refusal: tuple[int, str], code: int, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refusal = refusal
    assert main(PLAN) == code
    assert_one_sentence(capsys, f"MODEL '{NAME}' is no directory here and the hub did not give it")


def test_an_unknown_revision_is_refused(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "--revision", "v9"]) == 2
    assert_one_sentence(capsys, f"MODEL '{NAME}' at --revision 'v9' is no directory here")
    assert not hub.fetched


def test_a_hub_that_is_not_there_is_no_mistake_of_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    use_hub(f"http://127.0.0.1:{port}", tmp_path, monkeypatch)
    assert main(PLAN) == 1
    assert_one_sentence(capsys, f"MODEL '{NAME}' is no directory here and the hub did not give it")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["slice", "nobody/no-such-model", "--output", str(tmp_path / "out")]) == 1
    assert_one_sentence(capsys, "MODEL 'nobody/no-such-model' is no directory here")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("the back end has given up")]
)
def test_what_cannot_be_kept_is_no_mistake_of_the_users(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("sliceserve.slicing.source.snapshot_download", download)
    with pytest.raises(MachineError, match=f"the hub did not give it: .*{error.args[-1]}"):
        locate(NAME)


def test_a_name_that_the_hub_cannot_have_is_refused(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "owner/na me", "--gpu-memory", "1GiB"]) == 2
    assert_one_sentence(capsys, "MODEL 'owner/na me' is no directory here and the hub did not")
    assert not hub.fetched


@pytest.mark.parametrize("command", ["slice", "plan", "perplexity", "evaluate", "benchmark"])
@pytest.mark.parametrize("kind", ["directory", "m.gguf"])
def test_a_revision_of_a_path_is_refused(
    command: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = tmp_path / kind, tmp_path / "text"
    text.write_text("Some text. " * 9)
    if kind == "directory":
        tiny_config(architectures=["LlamaForCausalLM"]).save_pretrained(model)
    else:
        model.write_bytes(b"GGUF")
    (tmp_path / "piqa").mkdir()
    example = {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}
    (tmp_path / "piqa" / "validation.jsonl").write_text(json.dumps(example) + "\n")
    more = {
        "slice": ["--output", str(tmp_path / "out")],
        "plan": ["--gpu-memory", "1GiB"],
        "perplexity": ["--text", str(text)],
        "evaluate": ["--tasks", "piqa", "--data", str(tmp_path)],
        "benchmark": [],
    }
    assert main([command, str(model), "--revision", "v1", *more[command]]) == 2
    assert_one_sentence(capsys, "--revision 'v1' is of ")
    assert not (tmp_path / "out").exists()


def test_of_several_models_the_one_on_the_hub_has_the_revision(hub: Hub, tmp_path: Path) -> None:
    dense, here = locate_all([NAME, str(tmp_path)], "v1")
    assert (dense.commit, here.commit, here.directory) == (OLD, None, tmp_path)
    assert [found.commit for found in locate_all([NAME, str(tmp_path)], None)] == [NEW, None]
    assert {commit for commit, _ in hub.fetched} == {OLD, NEW}
    for models, count in (([str(tmp_path)], 0), ([NAME, "a/b"], 2)):
        with pytest.raises(UserError, match=f"'v1' is of one model on the hub, and {count} of "):
            locate_all(models, "v1")


def test_a_plan_and_a_perplexity_are_those_of_the_revision(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for revision, positions in (("v1", 512), ("main", 99)):
        assert main([*PLAN, "--revision", revision]) == 0
        assert json.loads(capsys.readouterr().out)["load"]["context"] == positions
    assert hub.fetched
    assert {file for _, file in hub.fetched} == {"config.json"}
    (tmp_path / "text").write_text("Some text of a few hundred bytes. " * 9)
    measure = ["perplexity", NAME, "--text", str(tmp_path / "text"), "--sequence-length", "64"]
    assert main([*measure, "--revision", "v1"]) == 0
    assert (OLD, "model.safetensors") in hub.fetched
    assert (NEW, "model.safetensors") not in hub.fetched


@pytest.mark.parametrize(("revision", "commit"), [("v1", OLD), (None, NEW)])
def test_a_slice_says_what_it_was_made_of(
    revision: str | None, commit: str, hub: Hub, tmp_path: Path
) -> None:
    options = SliceOptions(NAME, tmp_path / "out", revision=revision, **SMALL)
    summary = run_slice(options, show_progress=False).summary
    source = summary.provenance["source"]
    assert (source["model"], source["revision"], source["commit"]) == (NAME, revision, commit)
    assert f"{NAME} (commit {commit}, sha256 " in describe(summary)
    assert {found for found, _ in hub.fetched} == {commit}


def test_another_revision_is_another_job(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish_part = Progress.finish_part

    def end(self: Progress, *arguments: Any) -> None:
        finish_part(self, *arguments)
        raise KeyboardInterrupt

    def options(revision: str | None) -> SliceOptions:
        return SliceOptions(NAME, tmp_path / "out", revision=revision, resume=True, **SMALL)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "finish_part", end)
        with pytest.raises(KeyboardInterrupt):
            run_slice(options("v1"), show_progress=False)
    for other, shown in (("refs/pr/1", "'refs/pr/1'"), (None, "None")):
        with pytest.raises(UserError, match=rf"options\.revision was 'v1' and is {shown}"):
            run_slice(options(other), show_progress=False)
    hub.refs["v1"] = NEW
    with pytest.raises(UserError, match=f"source commit was '{OLD}' and is '{NEW}'"):
        run_slice(options("v1"), show_progress=False)
    hub.refs["v1"] = OLD
    locate(NAME, revision="v1")
    hub.refusal = (503, "")
    source = run_slice(options("v1"), show_progress=False).summary.provenance["source"]
    assert (source["revision"], source["commit"]) == ("v1", OLD)


def assert_one_sentence(capsys: pytest.CaptureFixture[str], start: str) -> None:
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("sliceserve: ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"sliceserve: error: {start}")
    assert "Traceback" not in captured.err
