"""Options of the server that the chart gives or answers for are not for `server.extraArgs`."""

import re
from typing import Any

import pytest
import yaml
from helm_python import HelmError
from helm_render import CHART, FULL, HUB, NODES, of_kind, render, scenario, server_pod, with_values

from sliceserve.server.serve import make_parser
from sliceserve.slicing.arguments import make_parser as make_cli_parser

PARSER = make_parser()
ACTIONS = {flag: action for action in PARSER._actions for flag in action.option_strings}
CASES = {"keys": FULL, "nodes": NODES, "open": HUB}
# By the names of vLLM's parser, whatever else each is called.
TLS = {"ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers"}
TLS |= {"enable_ssl_refresh"}
NEVER = TLS | {
    "api_key", "api_key_file", "headless", "insecure", "master_addr", "master_port", "nnodes",
    "node_rank", "prefill_context_parallel_size", "uds",
}  # fmt: skip


def given(values: dict[str, Any]) -> list[str]:
    """The arguments of the server, or of the leader, without those of `server.extraArgs`."""
    values = with_values(values, "server.extraArgs", [])
    groups = of_kind(render(values), "LeaderWorkerSet")
    template = groups[0]["spec"]["leaderWorkerTemplate"]["leaderTemplate"] if groups else None
    (server,) = (template or server_pod(values))["spec"]["containers"]
    arguments: list[str] = server["args"]
    return arguments


def refusal(values: dict[str, Any], *words: str) -> str:
    """What Helm says of such `server.extraArgs`."""
    return refused(values, "server.extraArgs", list(words))


def refused(values: dict[str, Any], path: str, value: list[Any]) -> str:
    with pytest.raises(HelmError) as caught:
        render(with_values(values, path, value))
    return str(caught.value)


def called(action: Any) -> list[str]:
    """What an option may be called: its names, the shortest form of each, _ for -."""
    flags: list[str] = action.option_strings
    short = [
        next(flag[:end] for end in range(1, len(flag) + 1) if means(flag[:end], action))
        for flag in flags
    ]
    lowered = [f"--{flag[2:].replace('-', '_')}" for flag in flags if flag.startswith("--")]
    return list(dict.fromkeys([*flags, *short, *lowered]))


def means(text: str, action: Any) -> bool:
    if text in ACTIONS:
        return ACTIONS[text] is action
    found = PARSER._get_option_tuples(text) if text.strip("-") else []
    return [each[0] for each in found] == [action]


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_no_option_that_the_chart_gives_is_given_again(values: dict[str, Any]) -> None:
    """Every one of the rendered command line, by all of its names."""
    names = [argument.partition("=")[0] for argument in given(values)]
    assert len(names) >= 8
    for name in names:
        for flag in called(ACTIONS[name]):
            for words in ([f"{flag}=7"], ["--seed", "1", flag, "7"]):
                assert f"server.extraArgs must not have {flag}: " in refusal(values, *words)


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_only_what_the_chart_answers_for_is_refused(values: dict[str, Any]) -> None:
    mine = {ACTIONS[argument.partition("=")[0]].dest for argument in given(values)}
    others = []
    for flag, action in ACTIONS.items():
        if action.dest in mine | NEVER or action.dest.startswith("data_parallel_"):
            assert f"server.extraArgs must not have {flag}: " in refusal(values, flag)
        else:
            others += [flag, "port"]  # a word is no option
    assert len(others) > 200
    assert render(with_values(values, "server.extraArgs", others))


# What a refusal tells to set, and another value of it.
INSTEAD = {
    "server.port": 9000, "model.servedName": "other", "server.tensorParallelSize": 8,
    "server.pipelineParallelSize": 4, "server.nodes": 1, "server.drainTimeoutSeconds": 7,
    "server.startupMinutes": 7, "server.maxModelLen": 77, "auth.existingSecret": "",
}  # fmt: skip


def test_a_refusal_names_the_value_that_is_the_options() -> None:
    told = set()
    for values in (FULL, NODES):
        before = given(values)
        for argument in before:
            if path := re.search(r": set ([A-Za-z.]+)", refusal(values, argument)):
                told.add(path[1])
                assert argument not in given(with_values(values, path[1], INSTEAD[path[1]]))
    assert told == INSTEAD.keys()
    assert "set auth.existingSecret" in refusal(HUB, "--insecure")


def test_a_refusal_names_values_that_exist_and_no_key() -> None:
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    for dest in sorted(NEVER | {"host", "data_parallel_size", "metrics_public"}):
        (action,) = (found for found in PARSER._actions if found.dest == dest)
        said = refusal(FULL, f"{action.option_strings[0]}=key-of-alice")
        assert "key-of-alice" not in said
        assert dest not in TLS or "TLS ends at the Ingress" in said
        _, _, instead = said.partition("must not have ")
        paths = re.findall(rf"\b(?:{'|'.join(defaults)})\.[A-Za-z.]+", instead)
        assert paths
        for path in paths:
            place: Any = defaults
            for name in path.rstrip(".").split("."):
                place = place[name]


def test_no_option_of_the_job_that_the_chart_gives_is_given_again() -> None:
    values = scenario(CHART / "ci" / "hub-values.yaml")
    (job,) = of_kind(render(values), "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    script = container["command"][2]
    mine = {word for word in [*container["args"], *script.split()] if word.startswith("--")}
    assert mine == {"--fraction", "--device", "--revision", "--output", "--restart"}
    free = []
    for action in slice_options():
        for flag in action.option_strings:
            if flag in mine | {"--target-params"}:
                for words in ([f"{flag}=7"], ["--seed", "1", flag[:-1], "7"]):
                    said = refused(values, "slice.extraArgs", words)
                    assert "slice.extraArgs must not have --" in said
            else:
                free.append(flag)
    assert len(free) > 8
    assert render(with_values(values, "slice.extraArgs", [*free, "output"]))


def slice_options() -> list[Any]:
    (commands,) = (
        one for one in make_cli_parser()._actions if one.dest == "COMMAND" or one.choices
    )
    parser: Any = commands.choices
    return [one for one in parser["slice"]._actions if one.option_strings and one.dest != "help"]


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "Db_Password"])
@pytest.mark.parametrize("path", ["server.extraEnv", "slice.extraEnv"])
def test_a_secret_is_given_by_reference_only(path: str, name: str) -> None:
    said = refused(FULL, path, [{"name": "A", "value": "b"}, {"name": name, "value": "hidden"}])
    assert f"{path} must not have the value of {name}: give it valueFrom" in said
    assert "hidden" not in said
    by_reference = {"secretKeyRef": {"name": "mine", "key": "key"}}
    assert render(with_values(FULL, path, [{"name": name, "valueFrom": by_reference}]))
    assert render(with_values(FULL, path, [{"name": "TOKENIZERS_PARALLELISM", "value": "true"}]))


@pytest.mark.parametrize("name", ["SLICESERVE_API_KEY", "sliceserve_api_key_file", "VLLM_API_KEY"])
def test_keys_of_the_server_are_those_of_its_secret(name: str) -> None:
    by_reference = {"secretKeyRef": {"name": "mine", "key": "key"}}
    said = refused(HUB, "server.extraEnv", [{"name": name, "valueFrom": by_reference}])
    assert f"server.extraEnv must not have {name}: set auth.existingSecret" in said


def test_the_length_is_free_where_the_chart_gives_none() -> None:
    (server,) = server_pod(with_values(HUB, "server.extraArgs", ["--max-model-len=auto"]))["spec"][
        "containers"
    ]
    assert server["args"][-1] == "--max-model-len=auto"
