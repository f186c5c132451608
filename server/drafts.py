"""CUDA graphs for draft models, which vLLM 0.24 captures but does not run."""

import functools
from typing import Any


def dispatch_drafts(runner: Any) -> None:
    """Have a runner class of vLLM give its draft model the sizes of its CUDA graphs.

    The first vLLM that does so itself has its pull request 47460; there, and when it is called
    again, this changes nothing. Without graphs a draft's step takes longer than one of the model
    that it drafts for.

    Args:
        runner: ``GPUModelRunner``; its drafter is made before its modes are resolved.

    """
    resolve = runner._check_and_update_cudagraph_mode
    if hasattr(resolve, "__wrapped__"):
        return

    @functools.wraps(resolve)
    def resolve_drafts_too(self: Any, *args: Any, **options: Any) -> None:
        speculative = self.speculative_config
        drafter = self.drafter if speculative and speculative.uses_draft_model() else None
        if drafter is not None:
            drafter.cudagraph_dispatcher.keys_initialized = False
        resolve(self, *args, **options)
        if drafter is not None and not drafter.cudagraph_dispatcher.keys_initialized:
            drafter.initialize_cudagraph_keys(self.cudagraph_dispatcher.cudagraph_mode)

    runner._check_and_update_cudagraph_mode = resolve_drafts_too
