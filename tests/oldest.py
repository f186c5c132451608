"""What the oldest vLLM that is supported does not do on a CPU, with dense models either."""

import pytest
import vllm
from vllm.platforms import current_platform

OLDEST = current_platform.is_cpu() and vllm.__version__.startswith("0.24.")

# Its kernels for CPUs do not take what its sampler gives them for speculative decoding.
DRAFTS = not OLDEST
needs_asked_stages = pytest.mark.skipif(
    OLDEST, reason="vLLM 0.24 waits forever for stages that were asked something and have ended"
)
# It gathers the product of a factor of which every rank has all: on a CPU the shapes do not fit.
needs_sharded_adapters = pytest.mark.skipif(
    OLDEST, reason="vLLM 0.24 has no adapters under tensor parallelism on a CPU"
)
