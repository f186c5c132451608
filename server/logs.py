"""What uvicorn logs, without queries, which may hold keys, and without errors that are none."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.websockets.auto import AutoWebSocketsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

if TYPE_CHECKING:
    import asyncio

    from uvicorn._types import ASGISendEvent

_LOGGERS = ("uvicorn.error", "uvicorn.access")


def hide_queries() -> None:
    """Have uvicorn's lines end a path before its query: a browser can show a WebSocket no header.

    Call it once uvicorn has configured its loggers.
    """
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_without_queries)  # a second time does nothing


def _without_queries(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple):
        # A question mark of the path itself is quoted.
        record.args = tuple(
            arg.partition("?")[0] if isinstance(arg, str) else arg for arg in record.args
        )
    return True


class RefusingSocket(WebSocketsSansIOProtocol):
    """uvicorn's protocol of WebSockets, for which a refusal is an answer as good as another.

    uvicorn itself would log an error for every one that has a body, as if the application had
    returned without a word. Of a head that the WebSockets library cannot read, which uvicorn keeps
    without an answer, the connection ends.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn.debug = False  # it would log headers, and the key among them

    def data_received(self, data: bytes) -> None:
        """Read on; the first time it is a whole head."""
        super().data_received(data)
        if not self.handshake_initiated and not self.transport.is_closing():
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.transport.close()

    async def send(self, message: ASGISendEvent) -> None:
        """Pass a message on to the client."""
        await super().send(message)
        if self.initial_response is not None and self.close_sent:
            self.handshake_complete = True


def websocket_protocol() -> type[asyncio.Protocol] | str:
    """Return what `uvicorn.Config` takes for WebSockets: what older versions choose is right."""
    return RefusingSocket if AutoWebSocketsProtocol is WebSocketsSansIOProtocol else "auto"
