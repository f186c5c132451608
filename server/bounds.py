"""Bounds on what one request may ask of the engine, each refused with a 400 that names it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sliceserve.server.forms import FORMS, excess_of_form

STOP_CHARACTERS = 1024  # of one stop string: the API process looks for it after every token
INTEGER_BITS = 63  # beside the sign
BAD_WORDS = 1000  # each is made into tokens twice, in the API process

# Where a request of one of the APIs that vLLM serves has strings or tokens that end an answer or
# must not be in it, and how many tokens it wants at most.
_STOPS = ("stop", "stop_sequences", "stop_token_ids")
_LISTS = (*_STOPS, "bad_words")
_TOKENS = ("stop_token_ids",)
_OUTPUT_TOKENS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_LOGPROBS = ("logprobs", "top_logprobs", "prompt_logprobs")
_ALL = -1  # of the vocabulary
_BESIDE = ("vllm_xargs", "extra_args")  # what is passed on to the engine unseen
_TRANSFER = "kv_transfer_params"
_TRUTHS = frozenset({"1", "on", "t", "true", "y", "yes"})  # as pydantic reads them


@dataclass(frozen=True)
class Bounds:
    """What one request may ask for; None is no bound but vLLM's own.

    Attributes:
        sequences: prompts times completions of each.
        output_tokens: tokens of one completion.
        stops: strings, or tokens, that end it.
        logprobs: of one token. vLLM has the same bound, which streams meet after their 200.
        vocabulary: of the model, in tokens.

    """

    sequences: int
    output_tokens: int | None
    stops: int
    logprobs: int | None = None
    vocabulary: int | None = None


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
    if _is_true(given.get("background")):
        return Excess(
            "background", "Responses in the background are not served: nothing would bound them."
        )
    if given.get("features") is not None and "sampling_params" in given:
        return Excess("features", "features are of images or audio, and the model takes text only.")
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
        if (excess := _excess_of_one(asked, bounds, inner=asked is not given)) is not None:
            return excess
    return None


def _excess_of_one(asked: dict[str, Any], bounds: Bounds, *, inner: bool) -> Excess | None:
    """Return what is asked too much of each sequence; `inner` are vLLM's own parameters."""
    for name, value in asked.items():
        # What vLLM sends to its engine has no room for these.
        if isinstance(value, int) and value.bit_length() > INTEGER_BITS:
            return Excess(name, f"{name} is no number of {INTEGER_BITS + 1} bits.")
    for name in filter(asked.__contains__, _OUTPUT_TOKENS):
        # There null is no default, but all of the context.
        unbounded = inner and asked[name] is None
        tokens = _number(asked[name])
        if bounds.output_tokens is not None and (unbounded or tokens > bounds.output_tokens):
            told = "null" if unbounded else tokens
            return Excess(name, f"{name} is {told}, and {bounds.output_tokens} tokens are allowed.")
    for name in filter(asked.__contains__, _LOGPROBS):
        # In chat completions the other of the two has the number.
        number = 0 if isinstance(asked[name], bool) else _number(asked[name])
        if bounds.logprobs is not None and (number > bounds.logprobs or number == _ALL):
            return Excess(name, f"{name} is {number}, and {bounds.logprobs} logprobs are allowed.")
    for name in filter(asked.__contains__, _LISTS):
        if (message := _excess_of_list(name, asked[name], bounds)) is not None:
            return Excess(name, message)
    for name in filter(asked.__contains__, _BESIDE):
        beside = asked[name] if isinstance(asked[name], dict) else {}
        if not isinstance(beside.get(_TRANSFER, {}), dict | None):
            return Excess(name, f"{_TRANSFER} in {name} is no object.")
    for name in filter(asked.__contains__, FORMS):
        if (message := excess_of_form(name, asked[name])) is not None:
            return Excess(name, message)
    return None


def _excess_of_list(name: str, value: Any, bounds: Bounds) -> str | None:
    """Return a sentence on words or tokens that end an answer, or must not be in it."""
    entries = value if isinstance(value, list) else [value]
    if len(entries) > (allowed := bounds.stops if name in _STOPS else BAD_WORDS):
        return f"{name} has {len(entries)} entries, and {allowed} are allowed."
    longest = max((len(text) for text in entries if isinstance(text, str)), default=0)
    if longest > STOP_CHARACTERS:
        return f"An entry of {name} has {longest} characters, and {STOP_CHARACTERS} are allowed."
    if not all(_is_utf8(text) for text in entries if isinstance(text, str)):
        return f"An entry of {name} is no text: it has half of a surrogate pair."
    if name in _TOKENS and bounds.vocabulary is not None:
        # vLLM 0.24 gives them to its sampler unseen, which ends the engine.
        strange = [token for token in map(_number, entries) if not 0 <= token < bounds.vocabulary]
        if strange:
            return f"{name} has {strange[0]}, and the model has {bounds.vocabulary} tokens."
    return None


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


def _is_true(value: Any) -> bool:
    """Whether vLLM would take a value for true."""
    return value.lower() in _TRUTHS if isinstance(value, str) else value == 1


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
