"""The arguments of `sliceserve serve`: what is refused before a load, and what the chart gives."""

import socket
from pathlib import Path

import pytest
from helm_render import CHART, of_kind, render, scenario
from server_process import reserved_port

from sliceserve.server.ending import LAST_S
from sliceserve.server.serve import confine, main, make_parser, parse_arguments
from sliceserve.slicing.errors import UserError


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["/no/such/directory"], "/no/such/directory"),
        (["DIR", "--headless"], "--headless"),
        (["DIR", "--api-server-count", "2"], "--api-server-count 2"),
        (["DIR", "--enable-prompt-embeds"], "--enable-prompt-embeds"),
        (["DIR", "--speculative-config", '{"method": "eagle3"}'], "method 'eagle3'"),
        (["DIR", "--speculative-config", '{"method": "medusa"}'], "method 'medusa'"),
        (["DIR", "--model", "other"], "--model other"),
    ],
)
def test_refused_arguments_are_named(arguments: list[str], named: str) -> None:
    with pytest.raises(UserError) as caught:
        main(arguments)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_port_in_use_is_named(tiny_sliced: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port}: .*in use"):
            main([str(tiny_sliced), "--host", "127.0.0.1", "--port", str(port)])


def test_impossible_option_value_is_one_sentence(tiny_sliced: Path) -> None:
    wanted = pytest.raises(UserError, match=r"max_model_len \(99999999\)")
    with reserved_port() as port, wanted as caught:
        main([str(tiny_sliced), "--port", str(port), "--max-model-len", "99999999"])
    assert "\n" not in str(caught.value)


def test_missing_directory_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "required: DIR" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CHART.glob("ci/*-values.yaml")), ids=lambda path: path.name)
def test_the_server_takes_the_command_of_a_rendered_pod(path: Path) -> None:
    manifests = render(scenario(path))
    pods = [deployment["spec"]["template"] for deployment in of_kind(manifests, "Deployment")]
    for group in of_kind(manifests, "LeaderWorkerSet"):
        pods.append(group["spec"]["leaderWorkerTemplate"]["leaderTemplate"])
    (pod,) = pods
    (container,) = pod["spec"]["containers"]
    *program, directory = container["command"]
    assert "sliceserve serve" in " ".join(program)
    rest = [directory, *container["args"]]
    args, settings = parse_arguments(make_parser(), rest)
    assert settings.insecure != bool(settings.api_key_file)
    confine(args, keyed=bool(settings.api_key_file), insecure=settings.insecure)
    (probe,) = {container[name]["timeoutSeconds"] for name in ("livenessProbe", "readinessProbe")}
    assert probe > settings.probe_timeout
    grace = pod["spec"]["terminationGracePeriodSeconds"]
    waits = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert grace > waits + settings.drain_timeout + LAST_S
    assert args.host == "0.0.0.0"
    assert args.port == 8000
    assert args.model == directory
    options = dict(word.lstrip("-").split("=") for word in container["args"] if "=" in word)
    assert args.tensor_parallel_size == int(options["tensor-parallel-size"])
    assert args.pipeline_parallel_size == int(options["pipeline-parallel-size"])
    assert args.served_model_name == [options["served-model-name"]]
