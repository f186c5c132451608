"""Bounds on what one request may ask of the engine, each refused with a 400 that names it."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

STOP_CHARACTERS = 1024  # of one stop string: the API process looks for it after every token
EXPRESSION_CHARACTERS = 16384  # of a request: the API process compiles them before anything else

# Where a request of one of the APIs that vLLM serves has strings or tokens that end an answer, what
# the answer has to look like, regular expressions therein, and how many tokens it wants at most.
_STOPS = ("stop", "stop_sequences", "stop_token_ids")
_FORMS = ("response_format", "structured_outputs", "tools", "text", "output_config")
_EXPRESSIONS = ("pattern", "regex")
_AS_TEXT = ("json", "structural_tag")
_OUTPUT_TOKENS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_LOGPROBS = ("logprobs", "top_logprobs", "prompt_logprobs")
_ALL = -1  # of the vocabulary


@dataclass(frozen=True)
class Bounds:
    """What one request may ask for; None is no bound but vLLM's own.

    Attributes:
        sequences: prompts times completions of each.
        output_tokens: tokens of one completion.
        stops: strings, or tokens, that end it.
        logprobs: of one token. vLLM has the same bound, which streams meet after their 200.

    """

    sequences: int
    output_tokens: int | None
    stops: int
    logprobs: int | None = None


@dataclass(frozen=True)
class Excess:
    """What a request asks too much of: the name of its argument, and a sentence."""

    argument: str
    message: str


def find_excess(given: dict[str, Any], bounds: Bounds) -> Excess | None:
    """Return what a request's arguments ask too much of, or None.

    Values of a wrong type are left to vLLM, which refuses them; those that it would convert, such
    as the text "100", count as what it makes of them.
    """
    several, prompts = _prompts(given)
    for asked in (given, given.get("sampling_params")):
        if not isinstance(asked, dict):
            continue
        sequences = prompts * max(1, _number(asked.get("n")))
        if sequences > bounds.sequences:
            return Excess(
                "n" if prompts == 1 else several,
                f"The request asks for {sequences} sequences, and {bounds.sequences} are allowed.",
            )
        for name in filter(asked.__contains__, _OUTPUT_TOKENS):
            tokens = _number(asked[name])
            if bounds.output_tokens is not None and tokens > bounds.output_tokens:
                return Excess(
                    name, f"{name} is {tokens}, and {bounds.output_tokens} tokens are allowed."
                )
        for name in filter(asked.__contains__, _LOGPROBS):
            # In chat completions the other of the two has the number.
            number = 0 if isinstance(asked[name], bool) else _number(asked[name])
            if bounds.logprobs is not None and (number > bounds.logprobs or number == _ALL):
                return Excess(
                    name, f"{name} is {number}, and {bounds.logprobs} logprobs are allowed."
                )
        for name in filter(asked.__contains__, _STOPS):
            stops = asked.get(name)
            if isinstance(stops, list) and len(stops) > bounds.stops:
                return Excess(
                    name, f"{name} has {len(stops)} entries, and {bounds.stops} are allowed."
                )
            texts = stops if isinstance(stops, list) else [stops]
            longest = max((len(text) for text in texts if isinstance(text, str)), default=0)
            if longest > STOP_CHARACTERS:
                return Excess(
                    name,
                    f"A stop string has {longest} characters, and {STOP_CHARACTERS} are allowed.",
                )
        for name in filter(asked.__contains__, _FORMS):
            characters = sum(map(len, _expressions(asked.get(name))))
            if characters > EXPRESSION_CHARACTERS:
                return Excess(
                    name,
                    f"The regular expressions of {name} have {characters} characters, "
                    f"and {EXPRESSION_CHARACTERS} are allowed.",
                )
    return None


def _expressions(form: Any) -> Iterator[str]:
    """Yield the regular expressions of what an answer has to look like."""
    pending = [form]
    while pending:
        found = pending.pop()
        if isinstance(found, dict):
            pending += found.values()
            # Of properties that match one, the names are expressions.
            if isinstance(names := found.get("patternProperties"), dict):
                yield from names
            yield from (found[key] for key in _EXPRESSIONS if isinstance(found.get(key), str))
            for text in (found[key] for key in _AS_TEXT if isinstance(found.get(key), str)):
                with suppress(ValueError, RecursionError):
                    pending.append(json.loads(text))
        elif isinstance(found, list):
            pending += found


def _prompts(given: dict[str, Any]) -> tuple[str, int]:
    """Return which argument has the most prompts, and how many.

    They are texts, lists of tokens, conversations, or items to score.
    """
    counts = {"prompt": 1}
    for name, one in (("prompt", {str, list}), ("messages", {list}), ("items", {str, list})):
        value = given.get(name)
        if isinstance(value, list):
            counts[name] = max(1, sum(map(one.__contains__, map(type, value))))
    return max(counts.items(), key=lambda count: count[1])


def _number(value: Any) -> int:
    """Return the whole number that vLLM would take a value for, 0 if it would refuse it."""
    if isinstance(value, int):
        return value
    try:
        return int(float(value)) if isinstance(value, float | str) else 0
    except (ValueError, OverflowError):
        return 0
