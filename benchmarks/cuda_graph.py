"""Time work on a GPU without the time it takes to launch it."""

from collections.abc import Callable

import torch

ROUNDS = 5


def seconds(call: Callable[[], object], calls: int, replays: int) -> float:
    """Return the seconds of a call.

    Args:
        call: launches work on the GPU; run twice before it is timed.
        calls: in one CUDA graph.
        replays: of the graph in a round; the best of some rounds counts.

    """
    for _ in range(2):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    best = float("inf")
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / replays / calls / 1000)
    return best
