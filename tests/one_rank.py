"""vLLM's process groups, of this process alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)


@contextmanager
def one_rank(config: VllmConfig, store: Path) -> Iterator[None]:
    """Have them until the end of the block, and a config for what is made there."""
    try:
        with set_current_vllm_config(config):
            init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
            initialize_model_parallel(1, 1)
            yield
    finally:
        cleanup_dist_env_and_memory()
