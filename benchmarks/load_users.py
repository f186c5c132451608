"""What the users of load.py do: whole answers, streams, streams that are left, refused requests."""

import json
from argparse import ArgumentParser
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from locust import HttpUser, events, task
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import STATE_RUNNING, STATE_SPAWNING
from serving import KEY, NAME

ROUTE = "/v1/completions"
HEADERS = {"Authorization": f"Bearer {KEY}"}
RANDOM = np.random.default_rng(0)
TOO_MANY = 1000  # sequences of a request
TOTALS: Counter[str] = Counter()


@events.init_command_line_parser.add_listener
def add_option(parser: ArgumentParser) -> None:
    parser.add_argument("--totals", type=Path, help="file for what the users sent and got")


@events.request.add_listener
def count_failure(exception: object, name: str, **_: object) -> None:
    if exception is not None:
        TOTALS[f"failed: {name}: {exception}"] += 1


@events.user_error.add_listener
def count_error(exception: Exception, **_: object) -> None:
    TOTALS[f"failed: {exception!r}"] += 1


@events.quitting.add_listener
def tell(environment: Environment, **_: object) -> None:
    environment.parsed_options.totals.write_text(json.dumps(TOTALS))


class Reader(HttpUser):
    """Sends one request after the other; a third of them is left after the first tokens."""

    @task(2)
    def whole(self) -> None:
        """Ask for an answer in one piece."""
        body = self._body(1, stream=False)
        with self._post(body, "whole") as answer:
            self._check(answer, answer.json().get("usage"), body, "whole")

    @task(2)
    def stream(self) -> None:
        """Read a stream to its end."""
        body = self._body(1, stream=True)
        with self._post(body, "stream") as answer:
            lines = list(filter(None, answer.iter_lines()))
            usage = None
            if lines[-1:] == [b"data: [DONE]"]:
                usage = json.loads(lines[-2].removeprefix(b"data: ")).get("usage")
            self._check(answer, usage, body, "stream")

    @task(3)
    def left(self) -> None:
        """Leave a stream after some tokens."""
        body, most = self._body(100, stream=True), int(RANDOM.integers(1, 21))
        with self._post(body, "left") as answer:
            events_read = 0
            for line in filter(None, answer.iter_lines()):
                if line == b"data: [DONE]":  # many tokens may come in one event
                    break
                if not line.startswith(b'data: {"id"'):
                    answer.failure(f"the stream had {line!r}")
                    return
                events_read += 1
                if events_read == most:
                    break
            answer.close()
        TOTALS.update(
            left=1,
            prompt_tokens=len(body["prompt"]),
            left_at_least=events_read,
            left_at_most=body["max_tokens"],
        )

    @task(2)
    def refused(self) -> None:
        """Ask for more than the server allows."""
        with self._post(self._body(1, stream=False) | {"n": TOO_MANY}, "refused") as answer:
            if answer.status_code == 400:
                answer.success()
                TOTALS["refused"] += 1

    def _body(self, shortest: int, *, stream: bool) -> dict[str, Any]:
        """Return a request of some length, for an answer of at least `shortest` tokens."""
        body = {
            "model": NAME,
            "prompt": RANDOM.integers(200, size=RANDOM.integers(1, 201)).tolist(),
            "max_tokens": int(RANDOM.integers(shortest, 201)),
            "ignore_eos": True,
            "stream": stream,
        }
        return body | ({"stream_options": {"include_usage": True}} if stream else {})

    def _post(self, body: dict[str, Any], name: str) -> Any:
        # At its end Locust kills users between two tasks, some after they have begun the next one:
        # the server would count a request that nobody here has counted.
        if self.environment.runner.state not in (STATE_SPAWNING, STATE_RUNNING):
            raise StopUser
        return self.client.post(
            ROUTE, json=body, headers=HEADERS, name=name, stream=True, catch_response=True
        )

    def _check(self, answer: Any, usage: Any, body: dict[str, Any], name: str) -> None:
        """Count an answer whose usage is what was asked for, else a failure."""
        wanted = (len(body["prompt"]), body["max_tokens"])
        found = usage and (usage["prompt_tokens"], usage["completion_tokens"])
        if found != wanted:
            answer.failure(f"{answer.status_code}: tokens {found}, not {wanted}")
            return
        TOTALS.update({name: 1, "prompt_tokens": wanted[0], "tokens": wanted[1]})
