"""What `/v1/models` says beside vLLM's own answer: how the served model was sliced."""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse
from starlette.routing import Route

from sliceserve.slicing.checkpoint import read_sliced_config
from sliceserve.slicing.report import describe_ranks

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request

    from sliceserve.slicing.checkpoint import CheckpointSummary

MODELS = "/v1/models"


def sliced_facts(summary: CheckpointSummary) -> dict[str, Any]:
    """Return what was sliced, as JSON values; of local paths only the last part."""
    hidden_size = int(read_sliced_config(summary.directory).base().hidden_size)
    width = summary.slicing.widths[0]
    source = summary.provenance.get("source", {})
    options = summary.provenance.get("options", {})
    return {
        "fraction": round(1 - width / hidden_size, 4),
        "width": width,
        "hidden_size": hidden_size,
        "rotations": describe_ranks(summary.slicing.ranks),
        "parameters": summary.sliced_parameters,
        "dense_parameters": summary.dense_parameters,
        "ratio": round(summary.ratio, 4),
        "dtype": summary.stored_as,
        "source": _public(source.get("model")),
        "source_sha256": source.get("sha256"),
        "calibration": _public(options.get("calibration")),
    }


def show_facts(app: FastAPI, facts: dict[str, Any]) -> None:
    """Add the facts to the served model's entry in `/v1/models`; adapters' stay as they are.

    Args:
        app: vLLM's application, with its state.
        facts: what stands in the entry under `sliceserve`.

    """

    async def show_models(request: Request) -> JSONResponse:
        models = await request.app.state.openai_serving_models.show_available_models()
        content = models.model_dump()
        for card in content["data"]:
            if card.get("parent") is None:
                card["sliceserve"] = facts
        return JSONResponse(content)

    # The first route that fits answers.
    app.router.routes.insert(0, Route(MODELS, show_models, methods=["GET"]))


def _public(name: str | None) -> str | None:
    """Keep ids such as owner/name, and of paths nothing that says where they are."""
    if name is None or (name.count("/") <= 1 and not name.startswith((".", "/", "~"))):
        return name
    return PurePath(name).name
