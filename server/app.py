"""The OpenAI-compatible application on vLLM's engine, and its life from start to stop."""

from __future__ import annotations

import gc
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import vllm.envs
from fastapi import HTTPException
from prometheus_client import REGISTRY
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware
from vllm.logger import init_logger
from vllm.third_party import pynvml
from vllm.utils.gc_utils import freeze_gc_heap

from sliceserve.server import vllm_compat
from sliceserve.server.auth import KeyRing
from sliceserve.server.certificates import refreshing_certificates
from sliceserve.server.drain import METRICS
from sliceserve.server.ending import ended_after
from sliceserve.server.engine import start_engine
from sliceserve.server.exchange import REQUEST_ID
from sliceserve.server.failure import shared_failure
from sliceserve.server.gpus import GpuReader, engine_gpus, watching_gpus
from sliceserve.server.health import EngineProbe, Lifecycle, Phase
from sliceserve.server.introspection import show_facts, sliced_facts
from sliceserve.server.layering import Access, while_serving, while_starting
from sliceserve.server.life import run_until_signal
from sliceserve.server.listener import listening, make_listener
from sliceserve.server.live import LiveFigures
from sliceserve.server.metrics import ServerMetrics, gpus_of
from sliceserve.server.progress import shared_progress
from sliceserve.server.queued import TokenQueue
from sliceserve.server.starting import start_within
from sliceserve.server.status_page import show_status

if TYPE_CHECKING:
    import argparse
    import socket
    from collections.abc import Callable

    from fastapi import FastAPI, Request, Response

    from sliceserve.server.exchange import Exchange
    from sliceserve.server.settings import ServerSettings
    from sliceserve.slicing.checkpoint import CheckpointSummary

# vLLM's logging configuration, which its options and variables change, covers only this subtree.
_logger = init_logger("vllm.sliceserve")

# Asked more often than all others together: routes are tried one after the other, twice a request.
BUSY_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses"})
# Python looks for garbage after 700 new objects, and through those of all requests after some
# thousands: with 128 at once, 5 % of the process's time. Most objects go at once. By 20,000 and 20
# what waits for the last look grew by 6 MB in 5,000 requests, a third of them left.
GARBAGE_AFTER = (10_000, 5, 5)
# By these vLLM lets every client restart the engines with other parallelism, for MoE models.
CLOSED_PATHS = frozenset({"/scale_elastic_ep", "/is_scaling_elastic_ep"})


async def create_app(
    engine_client: Any, args: argparse.Namespace, summary: CheckpointSummary, live: LiveFigures
) -> FastAPI:
    """Return the application with vLLM's OpenAI, health and metrics routes on this engine."""
    supported_tasks = await engine_client.get_supported_tasks()
    app = vllm_compat.build_app(args, supported_tasks, engine_client.model_config)
    app.title = "sliceserve"
    arrange_routes(app)
    answer_as_openai(app)
    await vllm_compat.init_app_state(engine_client, app.state, args, supported_tasks)
    facts = sliced_facts(summary)
    show_facts(app, facts)
    template = getattr(engine_client.renderer.tokenizer, "chat_template", None)
    fixed = {
        "model": args.served_model_name[0],
        "chat": bool(args.chat_template or template),
        "sliceserve": facts,
        "gpus": gpus_of(engine_client.vllm_config),
    }
    show_status(app, fixed, live)
    return app


def arrange_routes(app: FastAPI) -> None:
    """Close some of vLLM's routes, and have those found first that are asked most."""

    def path_of(route: Any) -> str | None:
        return getattr(route, "path", None)

    opened = [route for route in app.routes if path_of(route) not in CLOSED_PATHS]
    app.router.routes[:] = sorted(opened, key=lambda route: path_of(route) not in BUSY_PATHS)


def answer_as_openai(app: FastAPI) -> None:
    """Have vLLM's error object answer for the router too, and for bodies that are no text.

    Other origins are let in by a layer of ours: vLLM's is taken away.
    """
    answer: Any = app.exception_handlers[HTTPException]

    async def answer_with_headers(request: Request, error: StarletteHTTPException) -> Response:
        response: Response = await answer(request, error)
        response.headers.update(error.headers or {})
        return response

    app.exception_handler(StarletteHTTPException)(answer_with_headers)
    layers: list[Any] = app.user_middleware
    layers[:] = [layer for layer in layers if layer.cls is not CORSMiddleware]
    app.middleware_stack = app.build_middleware_stack()  # vLLM has built it with the old ones


def create_metrics(vllm_config: Any, summary: CheckpointSummary) -> ServerMetrics:
    """Return our series, in the default registry.

    vLLM's ``/metrics`` shows it or, in multiprocess mode, the files that metrics of the default
    registry write too.
    """
    metrics = ServerMetrics(REGISTRY, vllm_config.model_config.served_model_name)
    metrics.set_engine(vllm_config)
    metrics.set_parameters(summary.dense_parameters, summary.sliced_parameters)
    return metrics


def access_of(settings: ServerSettings, args: argparse.Namespace) -> Access:
    """Read the keys; raises UserError if their file is unusable."""
    keys = KeyRing((key.get_secret_value() for key in settings.api_key), file=settings.api_key_file)
    public = frozenset({METRICS} if settings.metrics_public else ())
    cross_origin = {
        "allow_origins": args.allowed_origins,
        "allow_methods": args.allowed_methods,
        "allow_headers": args.allowed_headers,
        "allow_credentials": args.allow_credentials,
        "expose_headers": ["Retry-After", "X-Should-Retry", REQUEST_ID],
    }
    return Access(keys, public, cross_origin if args.allowed_origins else {})


async def serve(
    vllm_config: Any,
    args: argparse.Namespace,
    settings: ServerSettings,
    summary: CheckpointSummary,
    access: Access,
    log: Callable[[Exchange], None],
    address: str,
    bound: socket.socket,
) -> int:
    """Serve on the bound socket until a signal; returns 0, or 1 if the engine failed.

    The process has to end soon after it. Raises SystemExit with 1 if the start took too long.
    """
    lifecycle = Lifecycle()
    with ExitStack() as cleanup, ended_after():
        starting = while_starting(access, lifecycle, log)
        with (
            start_within(settings.start_timeout, lifecycle),
            listening(starting, args, bound),
            shared_progress() as loaded,
            shared_failure() as failure,
        ):
            lifecycle.enter(Phase.STARTING, "loading the model", loaded)
            try:
                metrics = create_metrics(vllm_config, summary)
                gpus = GpuReader(pynvml, engine_gpus(vllm_config, os.environ))
                live = LiveFigures()
                engine = start_engine(vllm_config, args, metrics, live)
                if settings.max_queued_tokens is not None:
                    engine.queue = TokenQueue(settings.max_queued_tokens, engine.queued_tokens)
            except Exception:
                if lifecycle.phase is Phase.FAILING:  # it took too long, which is told
                    raise
                if (cause := failure()) is not None:
                    _logger.error("The engine did not start: %s", cause)
                else:
                    _logger.exception("The engine did not start.")
                return 1
            # Does nothing after an orderly end.
            cleanup.callback(engine.shutdown, timeout=0)
            # As the engine's processes do: vLLM reads variables some 70 times a request.
            vllm.envs.enable_envs_cache()
            lifecycle.enter(Phase.STARTING, "opening the routes")
            await engine.reset_mm_cache()
            app = await create_app(engine, args, summary, live)
            # As the engine's processes do: a look through all that a start leaves stops every
            # answer for some tenths of a second.
            freeze_gc_heap()
            gc.set_threshold(*GARBAGE_AFTER)
        if traces := bool(args.otlp_traces_endpoint):
            from sliceserve.server.tracing import end_traces  # needs what vLLM needs for traces

            cleanup.callback(end_traces)
        probe = EngineProbe(engine.answer, settings.probe_timeout)
        serving, drain = while_serving(
            app, engine, probe, access, settings, lifecycle, metrics, log,
            max_logprobs=vllm_config.model_config.max_logprobs,
            vocabulary=vllm_config.model_config.get_vocab_size(), traces=traces,
        )  # fmt: skip
        listener = make_listener(
            serving, args, metrics.count_refused_head, ws_max_size=settings.max_body_size
        )
        app.state.server = listener  # vLLM's handlers of a dead engine's errors stop it
        _logger.info("Serving %s on %s", ", ".join(args.served_model_name), address)
        lifecycle.enter(Phase.SERVING, "answering requests")
        cleanup.enter_context(watching_gpus(gpus, metrics.set_gpu_readings))
        cleanup.enter_context(refreshing_certificates(listener.config, args))
        hung = probe.wait_until_hung(settings.hang_timeout)
        return await run_until_signal(
            listener, bound, engine, hung, drain, lifecycle, settings.drain_timeout
        )
