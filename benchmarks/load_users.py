"""What the users of load.py do: whole answers, streams, and streams that are left early."""

import numpy as np
from locust import HttpUser, task

HEADERS = {"Authorization": "Bearer load"}
RANDOM = np.random.default_rng(0)


class Reader(HttpUser):
    """Sends one request after the other; a third of them is left after the first tokens."""

    def body(self, shortest: int, stream: bool) -> dict[str, object]:
        """Return a request of some length, for an answer of at least `shortest` tokens."""
        prompt = RANDOM.integers(200, size=RANDOM.integers(1, 201)).tolist()
        return {
            "model": "load",
            "prompt": prompt,
            "max_tokens": int(RANDOM.integers(shortest, 201)),
            "ignore_eos": True,
            "stream": stream,
        }

    @task
    def whole(self) -> None:
        """Ask for an answer in one piece."""
        self.client.post("/v1/completions", json=self.body(1, False), headers=HEADERS, name="whole")

    @task
    def stream(self) -> None:
        """Read a stream to its end."""
        self._read(0, 1, "stream")

    @task
    def left(self) -> None:
        """Leave a stream after some tokens."""
        self._read(int(RANDOM.integers(1, 21)), 100, "left")

    def _read(self, most: int, shortest: int, name: str) -> None:
        with self.client.post(
            "/v1/completions",
            json=self.body(shortest, True),
            headers=HEADERS,
            name=name,
            stream=True,
            catch_response=True,
        ) as answer:
            last = b""
            for number, line in enumerate(filter(None, answer.iter_lines()), 1):
                last = line
                if number == most:
                    break
            if not most and last != b"data: [DONE]":
                answer.failure(f"the stream ended with {last!r}")
            answer.close()
