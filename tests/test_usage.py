"""What one HTTP request costs the engine, by the sequences that it begins."""

from types import SimpleNamespace
from typing import Any

from sliceserve.server.usage import Work, begin_work, end_work, watch_sequences, work_of


def sequence(tokens: int, index: int = 0, prompt: int = 10) -> Any:
    stats = SimpleNamespace(num_generation_tokens=tokens)
    return SimpleNamespace(prompt_len=prompt, request_index=index, stats=stats)


class Processor:
    """As much of vLLM's `OutputProcessor` as is watched."""

    def __init__(self) -> None:
        self.request_states: dict[str, Any] = {}

    def add_request(self, request: Any, prompt: Any) -> None:
        self.request_states[request.request_id] = prompt


def test_the_sequences_of_each_request_are_its_own_and_what_comes_later_counts() -> None:
    processor, scopes = Processor(), ({}, {})  # type: tuple[Processor, tuple[dict[str, Any], ...]]
    watch_sequences(processor)
    for number, scope in enumerate(scopes):
        token = begin_work(scope)
        for index in range(2):
            request = SimpleNamespace(request_id=f"{number}-{index}")
            processor.add_request(request, sequence(0, index, prompt=10 + number))
        end_work(token)
    processor.add_request(SimpleNamespace(request_id="of nobody"), sequence(5))
    processor.request_states["1-1"].stats.num_generation_tokens = 7
    processor.request_states.clear()
    assert [work_of(scope).tokens() for scope in scopes] == [(10, 0), (11, 7)]


def test_what_is_not_known_is_none() -> None:
    work = Work()
    assert work.tokens() is None
    work.add("a", SimpleNamespace(prompt_len=3, request_index=0, stats=None))
    assert work.tokens() is None
    assert work_of({}).tokens() is None


def test_the_beams_of_a_search_have_one_prompt() -> None:
    work = Work()
    for step in range(3):
        for beam in range(2):
            work.add(f"cmpl-1-{step}-beam-{beam}", sequence(1, prompt=10 + step))
    assert work.tokens() == (10, 6)


def test_a_sequence_that_goes_on_counts_once() -> None:
    work = Work()
    again = sequence(1)
    for _ in range(2):
        work.add("a", again)
    assert work.tokens() == (10, 1)
