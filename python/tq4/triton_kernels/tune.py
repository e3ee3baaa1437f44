"""Time candidate launch configurations on this GPU, to choose the entries of configs.py.

    python -m tq4.triton_kernels.tune prefill --tokens 16384
    python -m tq4.triton_kernels.tune decode --batch 64 --kv-len 8192 --head-dim 128 --heads 32,8

Prints one line per candidate, best first (a dozen; each takes several seconds to compile).  Times are medians
of CUDA events over the whole op, rotations and combination included, with the L2 cache flushed between runs;
in Triton's interpreter, of one run on the CPU, which only shows that the candidate works.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

import tq4
from tq4.backends import triton as backend
from tq4.backends.arguments import Attention
from tq4.layout import page_view

from . import configs
from .configs import DecodeConfig, PrefillConfig


def prefill_candidates(head_dim: int) -> Iterator[PrefillConfig]:
    """Tiles worth trying for a prefill of many rows: 16 rows a warp, one to four programs an SM."""
    chunk, widths = (32, (16, 32, 64)) if head_dim == 256 else (64, (32, 64, 128))
    for (block_m, warps, caps), block_n in itertools.product(
        ((64, 4, (None, 168)), (128, 8, (None, 128))), widths
    ):
        for maxnreg in caps:
            yield PrefillConfig(block_m, block_n, chunk, warps, maxnreg)


def decode_candidates(head_dim: int) -> Iterator[DecodeConfig]:
    """Tiles worth trying for a decode of up to 16 rows."""
    chunk = 32 if head_dim == 256 else 64
    registers = ((None, 2), (168, 3), (128, 4))
    for block_n, warps, (maxnreg, programs) in itertools.product((32, 64), (4, 8), registers):
        yield DecodeConfig(16, block_n, warps, max(1, programs * 4 // warps), 4, chunk, maxnreg)


@contextmanager
def _installed(table: dict[str, dict[int, Any]], head_dim: int, config: Any, device: torch.device):
    row = table[configs.architecture(backend._capability(device))]
    key = 128 if head_dim == 96 else head_dim
    before = row[key]
    row[key] = config
    try:
        yield
    finally:
        row[key] = before


def _problem(
    batch: int, query_len: int, kv_len: int, head_dim: int, heads: tuple[int, int], device: torch.device
) -> Attention:
    """Arguments of an attention op over random codes, norms near sqrt(D), shuffled pages of 16 tokens."""
    num_q_heads, num_kv_heads = heads
    pages = math.ceil(kv_len / 16)
    quantizer = tq4.Quantizer(head_dim, device=device)
    cache = tq4.PagedCache(batch * pages, num_kv_heads, head_dim, device=device).tensor
    cache.random_(0, 256)
    view = page_view(cache, num_kv_heads, head_dim)
    norms = torch.full((batch * pages, 16, num_kv_heads), math.sqrt(head_dim), device=device)
    for offset in (view.k_norms, view.v_norms):
        cache[..., offset : offset + 4 * num_kv_heads] = norms.view(torch.uint8)
    tokens = batch * query_len
    q = torch.randn(tokens, num_q_heads, head_dim, device=device).half()
    return Attention.of(
        q,
        cache,
        torch.randperm(batch * pages, device=device).int().view(batch, pages),
        torch.full((batch,), kv_len, dtype=torch.int32, device=device),
        torch.arange(0, tokens + 1, query_len, dtype=torch.int32, device=device),
        quantizer,
        num_kv_heads,
        max_query_len=query_len,
    )


def _milliseconds(run: Callable[[], None], device: torch.device) -> float:
    run()
    if device.type == "cuda":
        return float(do_bench(run, warmup=20, rep=80, return_mode="median"))
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def tune(
    op: str,
    *,
    batch: int,
    query_len: int,
    kv_len: int,
    head_dim: int,
    heads: tuple[int, int],
    device: torch.device,
    candidates: list[Any] | None = None,
) -> list[tuple[float, Any]]:
    """Time every candidate of an op; returns (milliseconds, configuration), best first.

    A candidate that needs more registers or shared memory than there are has an infinite time.
    """
    arguments = vars(_problem(batch, query_len, kv_len, head_dim, heads, device))
    if op == "prefill":
        table, run = configs.PREFILL, backend.prefill
        candidates = candidates or list(prefill_candidates(head_dim))
    else:
        table, run = configs.DECODE, backend.decode
        candidates = candidates or list(decode_candidates(head_dim))
    results = []
    for config in candidates:
        with _installed(table, head_dim, config, device):
            try:
                results.append((_milliseconds(lambda: run(**arguments), device), config))
            except OutOfResources:
                results.append((math.inf, config))
    return sorted(results, key=lambda result: result[0])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("op", choices=("prefill", "decode"))
    parser.add_argument("--tokens", type=int, default=16384, help="prefill: query tokens, all keys are new")
    parser.add_argument("--batch", type=int, default=64, help="decode: sequences")
    parser.add_argument("--kv-len", type=int, default=8192, help="decode: keys of each sequence")
    parser.add_argument("--head-dim", type=int, default=128, choices=(64, 96, 128, 256))
    parser.add_argument("--heads", default="32,8", help="query heads, KV heads")
    arguments = parser.parse_args()
    num_q_heads, num_kv_heads = (int(n) for n in arguments.heads.split(","))
    prefill = arguments.op == "prefill"
    shape = {
        "batch": 1 if prefill else arguments.batch,
        "query_len": arguments.tokens if prefill else 1,
        "kv_len": arguments.tokens if prefill else arguments.kv_len,
        "head_dim": arguments.head_dim,
        "heads": (num_q_heads, num_kv_heads),
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for milliseconds, config in tune(arguments.op, **shape, device=device):
        if prefill:
            speed = 2 * num_q_heads * arguments.head_dim * arguments.tokens**2 / milliseconds / 1e9
            unit = "TFLOPS"
        else:
            read = shape["batch"] * shape["kv_len"] * num_kv_heads * (arguments.head_dim + 8)
            speed = read / milliseconds / 1e6
            unit = "GB/s"
        print(f"{milliseconds:10.4f} ms  {speed:8.1f} {unit}  {config}")


if __name__ == "__main__":
    main()
