"""Where the time of a run goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up seconds by the name of what was done; waits for the GPU, which works behind."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a block."""
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[name] += time.perf_counter() - start

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        shares = sorted(self.seconds.items(), key=lambda share: -share[1])
        parts = (f"{name} {seconds:.1f} s" for name, seconds in shares)
        return f"{total:.1f} s: {', '.join(parts)}"
