"""The OpenAI-compatible application on vLLM's engine, and its life from start to stop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import vllm.envs
from prometheus_client import REGISTRY
from vllm.logger import init_logger
from vllm.v1.engine.async_llm import AsyncLLM

from sliceserve.server import vllm_compat
from sliceserve.server.metrics import ServerMetrics

if TYPE_CHECKING:
    import argparse
    import socket

    from fastapi import FastAPI

    from sliceserve.slicing.checkpoint import CheckpointSummary

# vLLM's logging configuration, which its options and variables change, covers only this subtree.
_logger = init_logger("vllm.sliceserve")


class Engine(AsyncLLM):  # type: ignore[misc]
    """vLLM's engine, which remembers whether it had died before it was told to stop."""

    started = False
    died = False

    def shutdown(self, timeout: float | None = None) -> None:
        """Stop the engine's processes."""
        if self.started:
            self.started = False
            self.died = bool(self.errored)
        super().shutdown(timeout=timeout)


async def create_app(engine_client: Any, args: argparse.Namespace) -> FastAPI:
    """Return the application with vLLM's OpenAI, health and metrics routes on this engine."""
    supported_tasks = await engine_client.get_supported_tasks()
    app = vllm_compat.build_app(args, supported_tasks, engine_client.model_config)
    app.title = "sliceserve"
    await vllm_compat.init_app_state(engine_client, app.state, args, supported_tasks)
    return app


def start_engine(vllm_config: Any, args: argparse.Namespace, summary: CheckpointSummary) -> Engine:
    """Load the model; must run inside an event loop.

    Our series go to the default registry: vLLM's ``/metrics`` shows it or, in multiprocess mode,
    the files that metrics of the default registry write too.
    """
    metrics = ServerMetrics(REGISTRY, vllm_config.model_config.served_model_name)
    metrics.set_engine(vllm_config)
    metrics.set_parameters(summary.dense_parameters, summary.sliced_parameters)
    engine: Engine = Engine.from_vllm_config(
        vllm_config,
        # A custom stat logger would switch the statistics on again.
        stat_loggers=None if args.disable_log_stats else [metrics.stat_logger],
        enable_log_requests=args.enable_log_requests,
        aggregate_engine_logging=args.aggregate_engine_logging,
        disable_log_stats=args.disable_log_stats,
    )
    engine.started = True
    return engine


async def serve(
    vllm_config: Any,
    args: argparse.Namespace,
    summary: CheckpointSummary,
    address: str,
    bound: socket.socket,
) -> int:
    """Serve on the bound socket until a signal; returns 0, or 1 if the engine failed."""
    try:
        engine = start_engine(vllm_config, args, summary)
    except Exception:
        _logger.exception("The engine did not start.")
        return 1
    try:
        await engine.reset_mm_cache()
        app = await create_app(engine, args)
        _logger.info("Serving %s on %s", ", ".join(args.served_model_name), address)
        log_config = vllm_compat.uvicorn_log_config(args)
        ending = await vllm_compat.serve_http(
            app,
            bound,
            enable_ssl_refresh=args.enable_ssl_refresh,
            host=args.host,
            port=args.port,
            log_level=args.uvicorn_log_level,
            access_log=not args.disable_uvicorn_access_log,
            timeout_keep_alive=vllm.envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
            ssl_keyfile=args.ssl_keyfile,
            ssl_certfile=args.ssl_certfile,
            ssl_ca_certs=args.ssl_ca_certs,
            ssl_cert_reqs=args.ssl_cert_reqs,
            ssl_ciphers=args.ssl_ciphers,
            h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
            h11_max_header_count=args.h11_max_header_count,
            **({} if log_config is None else {"log_config": log_config}),
        )
    finally:
        engine.shutdown(timeout=vllm_config.shutdown_timeout)
    # The HTTP server ends after the engine, so that running requests get their answers.
    await ending
    if engine.died:
        _logger.error("The engine died.")
    return int(engine.died)
