"""``GET /``: a page for people on the model and the server, and ``/status.json``, its figures.

The page is a fixed file that anyone may read, because nothing is in it: what it shows it fetches
with the key that its reader types. A browser keeps that key in the page's memory and sends it
nowhere by itself, so that, unlike with cookies or Basic authentication, no other site can use it.
"""

from __future__ import annotations

import base64
import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping

    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

    from sliceserve.server.live import LiveFigures

PAGE = "/"
STATUS = "/status.json"
FILES = Path(__file__).with_name("data")


class StatusPage:
    """ASGI layer that answers the page's path and passes everything else on."""

    def __init__(self, app: ASGIApp, *, keyed: bool) -> None:
        """Wrap the application; `keyed` tells whether the page must ask for a key."""
        self.app, self._page = app, make_page(keyed=keyed)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Answer with the page, or pass the request on; no coroutine, which would cost a frame."""
        asked = (
            scope["type"] == "http" and scope["path"] == PAGE and scope["method"] in ("GET", "HEAD")
        )
        return (self._page if asked else self.app)(scope, receive, send)


def make_page(*, keyed: bool) -> HTMLResponse:
    """Return the page with its style and script inside, and headers that allow only these."""
    style, script = ((FILES / f"status.{kind}").read_text("utf-8") for kind in ("css", "js"))
    environment = Environment(
        loader=FileSystemLoader(FILES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("status.html.jinja").render(
        style=Markup(style),  # noqa: S704
        script=Markup(script),  # noqa: S704
        keyed=keyed,
    )
    policy = (
        "default-src 'none'",
        "connect-src 'self'",
        "img-src data:",  # the icon
        f"script-src {_source_of(script)}",
        f"style-src {_source_of(style)}",
        "base-uri 'none'",
        "form-action 'none'",  # the script reads the forms; a key must not end up in an address
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return HTMLResponse(
        page,
        headers={
            "Content-Security-Policy": "; ".join(policy),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        },
    )


def show_status(app: FastAPI, fixed: Mapping[str, Any], live: LiveFigures) -> None:
    """Add the route of the page's figures.

    Args:
        app: vLLM's application.
        fixed: what does not change while the server runs.
        live: what does.

    """
    began = time.monotonic()

    async def status(_request: Request) -> JSONResponse:
        uptime = round(time.monotonic() - began, 1)
        content = {**fixed, "uptime_seconds": uptime, **live.describe()}
        return JSONResponse(content, headers={"Cache-Control": "no-store"})

    # The first route that fits answers.
    app.router.routes.insert(0, Route(STATUS, status, methods=["GET"]))


def _source_of(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
