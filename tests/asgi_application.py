"""An application to put our layers round, in one process with httpx."""

import asyncio
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


class Application:
    """Counts the requests that reach it, and whether one was left."""

    def __init__(self) -> None:
        self.reached = 0
        self.left = asyncio.Event()
        self.going = asyncio.Event()

    async def answer(self, request: Request) -> Response:
        """Answer at once; ?tokens= are left where vLLM leaves them."""
        self.reached += 1
        if tokens := int(request.query_params.get("tokens", 0)):
            usage = type("Usage", (), {"prompt_tokens": tokens - 1, "completion_tokens": 1})
            request.state.request_metadata = type("Metadata", (), {"final_usage_info": usage})
        return JSONResponse({"model": "m"})

    async def wait(self, request: Request) -> Response:
        """Answer when it may, or notice as vLLM's routes do that the client left."""
        self.reached += 1
        await request.body()
        leaving = asyncio.ensure_future(request.receive())
        going = asyncio.ensure_future(self.going.wait())
        await asyncio.wait([leaving, going], return_when=asyncio.FIRST_COMPLETED)
        if leaving.done():
            assert leaving.result()["type"] == "http.disconnect"
            self.left.set()
        return JSONResponse("late")

    async def stream(self, _request: Request) -> Response:
        async def parts() -> Any:
            try:
                for number in range(10**9):
                    yield f"data: {number}\n\n"
                    await asyncio.sleep(0.01)
            finally:
                self.left.set()

        return StreamingResponse(parts(), media_type="text/event-stream")

    @property
    def app(self) -> Starlette:
        handlers = {"answer": self.answer, "wait": self.wait, "stream": self.stream}
        paths = {"/v1/completions": self.answer} | {f"/{k}": v for k, v in handlers.items()}
        return Starlette(
            routes=[
                Route(path, handler, methods=["GET", "POST"]) for path, handler in paths.items()
            ]
        )


def client_of(app: Any, key: str = "a") -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {key}"}
    transport = httpx.ASGITransport(app=app)
    return httpx.AsyncClient(transport=transport, base_url="http://server", headers=headers)


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status
    error: dict[str, Any] = answer.json()["error"]
    assert error["code"] == status
    return error
