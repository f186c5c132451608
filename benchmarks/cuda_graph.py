"""Time work on a GPU without the time it takes to launch it."""

import time
from collections.abc import Callable, Sequence

import torch

ROUNDS = 5
WARM_SECONDS = 0.3  # until a GPU at its limit of power has found its clock


def seconds(call: Callable[[], object], calls: int, replays: int) -> float:
    """Return the seconds of a call; arguments as those of `seconds_in_turn`."""
    return seconds_in_turn([call], calls, replays)[0]


def seconds_in_turn(timed: Sequence[Callable[[], object]], calls: int, replays: int) -> list[float]:
    """Return the seconds of a call of each.

    They take turns: a GPU that has rested runs faster for a while, whatever comes first.

    Args:
        timed: each launches work on the GPU; run twice before it is timed.
        calls: in one CUDA graph.
        replays: of the graph in a round; the best of some rounds counts.

    """
    graphs = [_captured(call, calls) for call in timed]
    begun = time.perf_counter()
    while time.perf_counter() - begun < WARM_SECONDS:
        for graph in graphs:
            _replayed(graph, replays)
    rounds = [[_replayed(graph, replays) for graph in graphs] for _ in range(ROUNDS)]
    return [min(column) / calls for column in zip(*rounds, strict=True)]


def _captured(call: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    for _ in range(2):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph


def _replayed(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Return the seconds of a replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / replays / 1000
