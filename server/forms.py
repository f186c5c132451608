"""Bounds on what an answer has to look like, which vLLM compiles before the model runs.

A compilation cannot be ended, and few run at a time: who asks for one that takes minutes takes them
from all. With xgrammar and the vocabulary of SmolLM2 (49,152 tokens) 64 KiB take at most half a
second, unless one object has many properties, whose time grows with the cube: 455 take 0.4 s, and
1,820 take 30 s.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

EXPRESSION_CHARACTERS = 16384  # of regular expressions: the API process compiles them, too
FORM_CHARACTERS = 2**16
TOOLS_CHARACTERS = 2**18  # most of them are text for the model, and are not compiled
PROPERTIES = 512  # of one object
_TOOLS = "tools"
# The arguments of the APIs that vLLM serves which have a form; in one, what holds expressions and
# what may hold a form as text.
FORMS = ("response_format", "structured_outputs", _TOOLS, "text", "output_config")
_EXPRESSIONS = ("pattern", "regex")
_AS_TEXT = ("json", "structural_tag")
_NAMED = ("properties", "patternProperties")


def excess_of_form(name: str, form: Any) -> str | None:
    """Return a sentence on what is too large of a form, or None.

    Args:
        name: the request's argument.
        form: its value.

    """
    if isinstance(form, str):
        return None  # in other APIs of the same name
    allowed = TOOLS_CHARACTERS if name == _TOOLS else FORM_CHARACTERS
    expressions = characters = 0
    for part in _parts(form):
        if isinstance(part, str):
            characters += len(part)
            continue
        characters += sum(map(len, part))
        expressions += sum(len(part[key]) for key in _EXPRESSIONS if isinstance(part.get(key), str))
        for key in _NAMED:
            if not isinstance(names := part.get(key), dict):
                continue
            if len(names) > PROPERTIES:
                return (
                    f"An object of {name} has {len(names)} properties, "
                    f"and {PROPERTIES} are allowed."
                )
            # Of properties that match one, the names are expressions.
            expressions += sum(map(len, names)) if key == "patternProperties" else 0
    if expressions > EXPRESSION_CHARACTERS:
        return (
            f"The regular expressions of {name} have {expressions} characters, "
            f"and {EXPRESSION_CHARACTERS} are allowed."
        )
    if characters > allowed:
        return f"{name} has {characters} characters, and {allowed} are allowed."
    return None


def _parts(form: Any) -> Iterator[str | dict[str, Any]]:
    """Yield the texts and objects of a form, and of forms therein that are texts themselves."""
    pending = [form]
    while pending:
        found = pending.pop()
        if isinstance(found, dict):
            yield found
            pending += found.values()
            for text in (found[key] for key in _AS_TEXT if isinstance(found.get(key), str)):
                with suppress(ValueError, RecursionError):
                    pending.append(json.loads(text))
        elif isinstance(found, list):
            pending += found
        elif isinstance(found, str):
            yield found
        else:
            yield "0"  # numbers are text to a compiler, if short
