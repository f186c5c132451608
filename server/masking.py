"""What is secret in the options of a server, masked before they are shown."""

from __future__ import annotations

import logging
import re
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import SecretStr

# In vLLM's options, and in what it passes on to loaders and connectors, of which it knows nothing.
# Numbers of tokens are none, nor are tokens of the model's own.
_OWN = "bos", "eos", "pad", "unk", "cls", "sep", "mask", "image", "audio", "video"
_NAMES = r"token|auth|(?:key|secret|password|passwd|passphrase|credential|authorization)s?"
_NOT_OWN = "".join(f"(?<!{kind}_token)" for kind in _OWN)
_SECRET = re.compile(rf"(?:{_NAMES})${_NOT_OWN}", re.IGNORECASE)
_USER_OF_URL = re.compile(r"(?<=://)[^/?#\s]*(?=@)")
# As clouds sign them, too.
_IN_QUERY = re.compile(rf"([?&][^=?&#\s]*(?:{_NAMES}|sig|signature)=)[^&#\s'\"]+", re.IGNORECASE)
# By these vLLM 0.24 to 0.32 tells its options, and its engine's process what became of them.
_LOGGERS = ("vllm.entrypoints.serve.utils.api_utils", "vllm.v1.engine.core")
MASK = str(SecretStr("secret"))


def masked(value: Any, name: str = "") -> Any:
    """Return a value as JSON can hold it, without what names in it or a URL's user are secret by.

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
    return _without_secrets(value) if isinstance(value, str) else value


def mask_logs() -> None:
    """Have vLLM's lines that show its options mask them as `masked` does, in this process.

    Safe to call more than once.
    """
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_mask)


def _mask(record: logging.LogRecord) -> bool:
    if isinstance(record.args, dict):
        record.args = masked(record.args)
    try:
        text = record.getMessage()
    except (TypeError, ValueError):
        return True  # logging says so where it writes
    if (shown := _without_secrets(text)) != text:
        record.msg, record.args = shown, ()
    return True


def _without_secrets(text: str) -> str:
    return _IN_QUERY.sub(rf"\1{MASK}", _USER_OF_URL.sub(MASK, text))
