"""What vLLM calls through the entry point `vllm.general_plugins`, in every one of its processes."""

import logging


def register() -> None:
    """Make vLLM read sliced checkpoints; safe to call more than once."""
    from vllm import ModelRegistry

    from sliceserve.server.failure import tell_failures
    from sliceserve.server.grammars import guard_grammars
    from sliceserve.server.masking import mask_logs
    from sliceserve.slicing.config import CAUSAL_LM, register_config

    mask_logs()
    tell_failures(logging.getLogger("vllm"))
    register_config()
    # By name and not by class: vLLM then imports the model only where it runs it.
    ModelRegistry.register_model(CAUSAL_LM, f"sliceserve.server.models:{CAUSAL_LM}")
    guard_grammars()
