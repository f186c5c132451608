"""What is secret in the options of a server, masked before they are shown."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import SecretStr

# In vLLM's options, and in what it passes on to loaders and connectors, of which it knows nothing.
# Numbers of tokens are none.
_SECRET = re.compile(
    r"(token|(key|secret|password|passwd|passphrase|credential|authorization)s?)$", re.IGNORECASE
)
_USER_OF_URL = re.compile(r"(?<=://)[^/?#\s]*(?=@)")
MASK = str(SecretStr("secret"))


def masked(value: Any, name: str = "") -> Any:
    """Return a value as JSON can hold it, without what its names or a URL's user say is secret.

    Args:
        value: of an option; dataclasses become objects of their fields.
        name: of the option.

    """
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name, None) for field in fields(value)}
    # What is switched on or off is none, such as hf_token: true.
    if _SECRET.search(name) and value and not isinstance(value, bool):
        return MASK
    if isinstance(value, dict):
        return {key: masked(one, str(key)) for key, one in value.items()}
    if isinstance(value, list | tuple | set):
        return [masked(one) for one in value]
    return _USER_OF_URL.sub(MASK, value) if isinstance(value, str) else value
