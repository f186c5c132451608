"""Log-likelihood of windows of tokens through vLLM's engine."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sliceserve.server.failure import loading_fault
from sliceserve.slicing.errors import UserError, reason


def negative_log_likelihood(
    directory: Path, windows: Tensor, dtype: torch.dtype | None, show_progress: bool = True
) -> float:
    """Return the summed negative log-likelihood (nats) of every token but the first of a window.

    The engine runs in this process, on the device vLLM chooses; windows do not see each other.

    Args:
        directory: a dense model or a sliced checkpoint.
        windows: token ids [windows, sequence_length].
        dtype: to run in; None takes the stored one.
        show_progress: whether to show vLLM's bar.

    Raises:
        UserError: vLLM is not installed or cannot load the model.
        MachineError: it has too little memory, or its engine did not start.

    """
    # In this process an error comes out as itself, and nothing outlives an interrupt.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise UserError(
            f"--backend 'vllm' needs vLLM, which cannot be imported: {error}"
        ) from error
    try:
        engine = LLM(
            model=str(directory),
            dtype=dtype or "auto",
            max_model_len=windows.shape[1] + 1,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            enforce_eager=True,
        )
    except Exception as error:
        # Everything is caught: bad models, too little memory, missing kernels, all its own.
        raise loading_fault(error)(
            f"vLLM cannot load {str(directory)!r}: {reason(error)}"
        ) from error
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    prompts = [{"prompt_token_ids": window} for window in windows.tolist()]
    total = 0.0
    for output in engine.generate(prompts, sampling, use_tqdm=show_progress):
        steps: list[Any] = output.prompt_logprobs[1:]
        ids = output.prompt_token_ids[1:]
        total -= sum(step[token].logprob for step, token in zip(steps, ids, strict=True))
    engine.llm_engine.engine_core.shutdown()
    return total
