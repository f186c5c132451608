"""The commands of a group's pods, run here with stand-ins for ray and the server."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helm_render import NODES, Manifest, of_kind, render, with_values

from sliceserve.server.serve import make_parser, parse_arguments

PATIENCE_S = 60
LEADER = "demo-sliceserve-group-0.demo-sliceserve-group.llm"
# Each notes who it is and what it is given. Whatever blocks ends with the code 7 by SIGTERM; there
# is a head of Ray at an address once one has been started on its port.
STAND_IN = """#!{python} -S
import json, os, signal, sys, time

def note(**what):
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps(dict(what, name=name, pid=os.getpid())) + "\\n")

def stopped(number, frame):
    note(signal=number)
    sys.exit(7)

name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
if name == "sleep":
    time.sleep(0.05)
    sys.exit()
if name == "sliceserve" or "--block" in arguments:
    signal.signal(signal.SIGTERM, stopped)
    note(arguments=arguments)
    while True:
        signal.pause()
note(arguments=arguments)
if "--head" in arguments:
    sys.exit(int(os.environ["HEAD_CODE"]))
if arguments[0] == "health-check":
    port = arguments[2].rpartition(":")[2]
    notes = open(os.environ["NOTES"]).read()
    sys.exit(f'"--head", "--port={{port}}"' not in notes)
"""


@dataclass(frozen=True)
class Group:
    """The pods of one replica, and a place for what they note."""

    leader: Manifest
    worker: Manifest
    work: Path

    def notes(self) -> list[dict[str, Any]]:
        path = self.work / "notes"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # The last one may still be being written.
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait_for(self, wanted: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        deadline = time.monotonic() + PATIENCE_S
        while not wanted(notes := self.notes()):
            assert time.monotonic() < deadline, notes
            time.sleep(0.02)
        return notes

    @contextmanager
    def started(
        self, container: Manifest, head_code: int = 0
    ) -> Iterator["subprocess.Popen[bytes]"]:
        """A pod's command with the kubelet's variables; nothing of it is left after the block."""
        variables = {
            "LWS_LEADER_ADDRESS": LEADER,
            "NOTES": str(self.work / "notes"),
            "HEAD_CODE": str(head_code),
            "PATH": f"{self.work / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }
        words = [*container["command"], *container.get("args", [])]
        filled = [re.sub(r"\$\((\w+)\)", lambda name: variables[name[1]], word) for word in words]
        with subprocess.Popen(
            filled, env=os.environ | variables, start_new_session=True
        ) as process:
            try:
                yield process
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def group(tmp_path: Path) -> Group:
    (tmp_path / "bin").mkdir()
    for name in ("ray", "sliceserve", "sleep"):
        path = tmp_path / "bin" / name
        path.write_text(STAND_IN.format(python=sys.executable))
        path.chmod(0o755)
    # A name that a shell would take apart.
    (found,) = of_kind(
        render(with_values(NODES, "model.servedName", "a  $0 name")), "LeaderWorkerSet"
    )
    template = found["spec"]["leaderWorkerTemplate"]
    (leader,), (worker,) = (
        template[f"{role}Template"]["spec"]["containers"] for role in ("leader", "worker")
    )
    return Group(leader, worker, tmp_path)


def of_name(notes: list[dict[str, Any]], name: str, *first: str) -> list[dict[str, Any]]:
    """Notes of a program by its first arguments."""
    return [
        note for note in notes
        if note["name"] == name and note.get("arguments", [])[: len(first)] == list(first)
    ]  # fmt: skip


def test_workers_join_the_head_once_it_is_there_and_signals_reach_who_must_stop(
    group: Group,
) -> None:
    with ExitStack() as stack:
        worker = stack.enter_context(group.started(group.worker))
        alone = group.wait_for(lambda notes: len(of_name(notes, "ray", "health-check")) >= 3)
        assert of_name(alone, "ray") == alone == of_name(alone, "ray", "health-check")
        leader = stack.enter_context(group.started(group.leader))
        notes = group.wait_for(
            lambda notes: bool(of_name(notes, "sliceserve")) and notes_of_join(notes) != []
        )
        (head,) = of_name(notes, "ray", "start", "--head")
        (server,) = of_name(notes, "sliceserve", "serve")
        (join,) = notes_of_join(notes)
        assert notes.index(head) < min(notes.index(server), notes.index(join))
        (port,) = (word.removeprefix("--port=") for word in head["arguments"] if "--port=" in word)
        address = ["--address", f"{LEADER}:{port}"]
        checks = of_name(notes, "ray", "health-check")
        assert {tuple(note["arguments"]) for note in checks} == {("health-check", *address)}
        assert join["arguments"][:3] == ["start", *address]
        # The shells have become what they start: the kubelet's signal is for process 1.
        assert (server["pid"], join["pid"]) == (leader.pid, worker.pid)
        leader.terminate()
        assert leader.wait(PATIENCE_S) == 7
        worker.terminate()
        assert worker.wait(PATIENCE_S) == 7
    assert [note["name"] for note in group.notes() if "signal" in note] == ["sliceserve", "ray"]


def notes_of_join(notes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return of_name(notes, "ray", "start", "--address")


def test_the_server_gets_what_its_parser_takes(group: Group) -> None:
    with group.started(group.leader):
        notes = group.wait_for(lambda notes: bool(of_name(notes, "sliceserve")))
    (server,) = of_name(notes, "sliceserve")
    command, *rest = server["arguments"]
    assert command == "serve"
    args, settings = parse_arguments(make_parser(), rest)
    assert args.model == group.leader["command"][3]
    assert args.served_model_name == ["a  $0 name"]
    assert args.distributed_executor_backend == "ray"
    assert (args.tensor_parallel_size, args.pipeline_parallel_size) == (4, 2)
    assert str(settings.api_key_file) == "/etc/sliceserve/key/api-key"


def test_a_leader_whose_head_does_not_start_serves_nothing(group: Group) -> None:
    """And ends, so that the group starts anew."""
    with group.started(group.leader, head_code=3) as leader:
        assert leader.wait(PATIENCE_S) == 3
    assert of_name(group.notes(), "sliceserve") == []
