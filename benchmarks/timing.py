"""Medians of event timings, the L2 flushed before every run.

On a GPU ``triton.testing.do_bench`` times the call between two CUDA events and overwrites a 256 MB buffer
before each run, so no run finds its pages in the L2.  Calls shorter than their launch are timed as a replayed
CUDA graph.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Budget:
    """How long one timing may warm up and repeat, in milliseconds."""

    warmup_ms: int = 20
    rep_ms: int = 60


def median_ms(call: Callable[[], object], budget: Budget, device: str = "cuda") -> float:
    """Median time of ``call`` in milliseconds."""
    call()
    if device == "cuda":
        from triton.testing import do_bench

        torch.cuda.synchronize()
        return float(do_bench(call, warmup=budget.warmup_ms, rep=budget.rep_ms, return_mode="median"))
    times: list[float] = []
    while sum(times) * 1e3 < budget.rep_ms or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """``call`` as a CUDA graph; returns its replay.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile and allocate outside the capture
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay
