"""What becomes of vLLM's application before our layers stand around it."""

from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse

from sliceserve.server.app import BUSY_PATHS, CLOSED_PATHS, answer_as_openai, arrange_routes

OTHERS = ("/health", "/v1/models", "/v1/completions/render")


def make_app() -> FastAPI:
    """An application with vLLM's CORS layer and its kind of error, and routes of many paths."""
    app = FastAPI()
    for path in (*sorted(CLOSED_PATHS), *OTHERS, *sorted(BUSY_PATHS)):
        app.add_api_route(path, lambda path=path: path, methods=["POST"])
    app.add_middleware(CORSMiddleware, allow_origins=["*"])

    async def answer(_request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code)

    app.exception_handler(HTTPException)(answer)
    return app


def test_what_is_asked_most_is_found_first_and_all_else_as_before() -> None:
    app = make_app()
    before = [getattr(route, "path", None) for route in app.routes]
    arrange_routes(app)
    after = [getattr(route, "path", None) for route in app.routes]
    assert set(after[: len(BUSY_PATHS)]) == BUSY_PATHS
    kept = [path for path in before if path not in CLOSED_PATHS | BUSY_PATHS]
    assert after[len(BUSY_PATHS) :] == kept
    client = TestClient(app)
    for path in (*OTHERS, *BUSY_PATHS):
        assert client.post(path).json() == path
    for path in CLOSED_PATHS:
        assert client.post(path).status_code == 404


def test_no_layer_of_vllms_lets_other_origins_in() -> None:
    app, headers = make_app(), {"Origin": "https://elsewhere.example"}
    header = "access-control-allow-origin"
    assert TestClient(app).post("/health", headers=headers).headers[header] == "*"
    answer_as_openai(app)
    answers = [TestClient(app).post(path, headers=headers) for path in ("/health", "/nowhere")]
    assert [answer.status_code for answer in answers] == [200, 404]
    assert not any(header in answer.headers for answer in answers)
    assert "error" in answers[1].json()
