"""Bounds on what an answer has to look like, which vLLM compiles before the model runs.

A compilation cannot be ended, and few run at a time: who asks for one that takes minutes takes them
from all. Most of 64 KiB take a tenth of a second; of an object's properties the time grows with the
cube of their number (`benchmarks/grammars.py`, docs/server.md).
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
PROPERTIES = 512  # of one object; of several, the squares of their numbers sum up to its square
_TOOLS = "tools"
# The arguments of the APIs that vLLM serves which have a form; in one, what holds expressions and
# what may hold a form as text.
FORMS = ("response_format", "structured_outputs", _TOOLS, "text", "output_config")
_EXPRESSIONS = ("pattern", "regex", "whitespace_pattern")
_AS_TEXT = ("json", "structural_tag")
_HAVE_FORMAT = ("text", "output_config")
_NAMED = ("properties", "patternProperties")
_TELLING = ("description", "title")
_BRACKETS = 2


def excess_of_form(name: str, form: Any) -> str | None:
    """Return a sentence on what is too large of a form, or None.

    Args:
        name: the request's argument.
        form: its value.

    """
    if isinstance(form, str):
        return None  # in other APIs of the same name
    allowed = TOOLS_CHARACTERS if name == _TOOLS else FORM_CHARACTERS
    expressions = characters = squares = 0
    for part in _parts(form):
        characters += len(part) if isinstance(part, str) else _BRACKETS
        if isinstance(part, dict):
            characters += sum(map(len, part))
            named = [part[key] for key in _NAMED if isinstance(part.get(key), dict)]
            squares += sum(len(names) ** 2 for names in named)
            expressions += sum(len(part[key]) for key in _EXPRESSIONS if _is_text(part, key))
            # Of properties that match one, the names are expressions.
            if isinstance(names := part.get(_NAMED[-1]), dict):
                expressions += sum(map(len, names))
        if squares > PROPERTIES**2:
            return (
                f"The objects of {name} have too many properties: the squares of their numbers "
                f"sum up to more than {PROPERTIES}²."
            )
        if expressions > EXPRESSION_CHARACTERS:
            return (
                f"The regular expressions of {name} have more than {EXPRESSION_CHARACTERS} "
                "characters."
            )
        if characters > allowed:
            return f"{name} has more than {allowed} characters."
    return None


def compiled_form(given: dict[str, Any]) -> str | None:
    """Return the argument of a request by which the engine compiles a form, if one does."""
    for name in FORMS:
        form = given.get(name)
        if name == _TOOLS:
            # Without a choice they are text for the model.
            wanted = form and given.get("tool_choice") not in (None, "auto", "none")
        else:
            inner = form.get("format") if isinstance(form, dict) and name in _HAVE_FORMAT else form
            wanted = isinstance(inner, dict) and inner.get("type") != "text" and inner
        if wanted:
            return name
    return None


def _is_text(part: dict[str, Any], key: str) -> bool:
    return isinstance(part.get(key), str)


def _parts(form: Any) -> Iterator[str | dict[str, Any] | list[Any]]:
    """Yield the texts, objects and lists of a form, and of forms therein that are texts."""
    pending = [form]
    while pending:
        found = pending.pop()
        if isinstance(found, dict):
            yield found
            for key, value in found.items():
                if key in _AS_TEXT and isinstance(value, str):
                    value = _read(value)
                # What only tells of a form is not compiled.
                if key not in _TELLING or not isinstance(value, str):
                    pending.append(value)
        elif isinstance(found, list):
            yield found
            pending += found
        else:
            yield found if isinstance(found, str) else "0"  # numbers are text to a compiler


def _read(text: str) -> Any:
    """Return the form that a text holds, or the text."""
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    return text
