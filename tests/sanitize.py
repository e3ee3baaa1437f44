"""Every kernel once on tiny shapes, for compute-sanitizer, with as little else on the GPU as possible.

    compute-sanitizer --tool memcheck  python tests/sanitize.py
    compute-sanitizer --tool racecheck python tests/sanitize.py
    compute-sanitizer --tool initcheck python tests/sanitize.py

Problems and answers are made on the CPU; the GPU sees copies, fills and tq4's kernels.  Each result is
checked too.  Options: what to run (default: cuda cuda-sm80 cuda-ahead cuda-sm80-ahead, the last two being the
prefill kernels that read unpacked tiles), --device cpu to try the script.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

# Freed tensors must be freed, and fresh ones uninitialised, for the tool to see what kernels touch.
if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here))
    try:
        import tq4
    except ImportError:
        sys.path.insert(0, str(here.parent / "python"))

import torch

import tq4
from support_attention import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    MODES,
    UNPACK_TARGETS,
    Case,
    Target,
    answer,
    build,
    judge,
    new_cache,
    quantizer,
    run,
)

_PREFILL = [
    Case(head_dim=128, seq_lens=(40, 0, 17), query_lens=(33, 1, 17)),
    Case(
        head_dim=64,
        seq_lens=(20,),
        query_lens=(20,),
        layout="head_major",
        int8=False,
        dtype=BFLOAT16,
        sinks=True,
    ),
    Case(head_dim=96, seq_lens=(50,), query_lens=(20,), group=3, window=(9, -1), padding_rows=1),
    Case(head_dim=256, seq_lens=(40,), query_lens=(18,), softcap=9.0, rotation=None, strided=True),
    Case(
        head_dim=128,
        seq_lens=(70,),
        query_lens=(20,),
        causal=False,
        page=32,
        layout="head_major",
        dtype=BFLOAT16,
    ),
    Case(head_dim=256, seq_lens=(20,), query_lens=(20,), int8=False),
]
_DECODE = [
    Case(head_dim=128, seq_lens=(70, 0, 1, 200), query_lens=(1, 1, 1, 1), group=4),
    Case(head_dim=128, seq_lens=(70, 0, 1, 200), query_lens=(1, 1, 1, 1), group=4, wide_table=True),
    Case(head_dim=64, seq_lens=(90,), query_lens=(1,), group=4, rotation="hadamard_matrix"),
    Case(head_dim=64, seq_lens=(90, 5, 33), query_lens=(1, 1, 1), kv_heads=40, group=1),
    Case(head_dim=128, seq_lens=(90, 5), query_lens=(4, 3), kv_heads=8, group=8),
    Case(head_dim=64, seq_lens=(40, 17), query_lens=(4, 2), layout="head_major", dtype=BFLOAT16, sinks=True),
    Case(head_dim=96, seq_lens=(33,), query_lens=(1,), int8=False, kv_heads=1, row_padding=8),
    Case(head_dim=256, seq_lens=(60,), query_lens=(2,), rotation=None, softcap=9.0, window=(20, -1)),
    Case(head_dim=128, seq_lens=(100,), query_lens=(16,), group=1, page=64, layout="head_major", int8=False),
]
_STORE = [
    Case(head_dim=64, kv_heads=1, dtype=FLOAT16),
    Case(head_dim=96, kv_heads=2, dtype=BFLOAT16, layout="head_major", rotation="haar"),
    Case(head_dim=128, kv_heads=3, dtype=FLOAT32, row_padding=8, norm_correction=True),
    Case(head_dim=256, kv_heads=2, dtype=FLOAT16, layout="head_major", rotation=None),
]


def attend(case: Case, op: str, target: Target, device: str) -> None:
    """One attention call over a problem made on the CPU, its result judged there."""
    problem = build(case, "cpu")
    moved = problem if device == "cpu" else problem.to(device)
    out = torch.full_like(problem.q, math.nan)
    with target.chosen():
        result, lse = run(moved, target.backend, op, out=out.to(device))
    answers = {mode: answer(problem, mode) for mode in (MODES if case.int8 else ("exact",))}
    judge(problem, answers, result.cpu(), lse.cpu(), f"{op} {target}")


def store_and_gather(case: Case, backend: str, device: str, tokens: int = 19) -> None:
    """store, gather, compress and decompress of tokens, one of them skipped, checked by the round trip."""
    hkv, d = case.kv_heads, case.head_dim
    key, value = torch.randn(2, tokens, hkv, d, generator=torch.Generator().manual_seed(0)).to(case.dtype)
    quant = quantizer(d, case.rotation, "cpu", case.norm_correction).to(device)
    cache = new_cache(case, tokens // case.page + 3).to(device)
    slots = torch.arange(16, 16 + tokens)
    slots[4] = -1
    tq4.store(key.to(device), value.to(device), cache, slots.to(device), quant, backend=backend)
    table = torch.tensor([[1, 2]], dtype=torch.int32).to(device)
    lens = torch.tensor([4], dtype=torch.int32).to(device)  # before the skipped token
    out = tuple(torch.zeros(4, hkv, d, dtype=case.dtype).to(device) for _ in range(2))
    tq4.gather(cache, table, lens, quant, num_kv_heads=hkv, out=out, backend=backend)
    packed, norms = torch.zeros(tokens, hkv, d // 2, dtype=torch.uint8), torch.zeros(tokens, hkv, 1)
    pair = (packed.to(device), norms.to(device))
    tq4.compress(key.to(device), quant, out=pair, backend=backend)
    back = torch.zeros(tokens, hkv, d, dtype=case.dtype).to(device)
    tq4.decompress(*pair, quant, out=back, backend=backend)
    for got, want in ((out[0], key[:4]), (out[1], value[:4]), (back, key)):
        error = (got.cpu().float() - want.float()).norm() / want.float().norm()
        assert 0.05 < error < 0.2, f"store and gather {backend} {case}: round trip error {error:.3g}"


def run_all(names: list[str], device: str) -> int:
    """Run the reduced set on targets by name and return the number of checked calls.

    A target that asks for a prefill kernel runs only what reaches that kernel.

    Raises:
        AssertionError: a result is wrong.
    """
    count = 0
    for name in names:
        target = next((t for t in UNPACK_TARGETS if t.name == name), Target(name, device))
        whole = target.unpack is None
        stores = _STORE if whole else []
        for case in stores:
            store_and_gather(case, target.backend, device)
        if whole and device != "cpu":  # enough for the kernels that take many rows
            store_and_gather(_STORE[0].but(kv_heads=16), target.backend, device, tokens=2400)
            store_and_gather(_STORE[0].but(head_dim=128, kv_heads=8), target.backend, device, tokens=1200)
        prefills = [case for case in _PREFILL if whole or case.int8]
        decodes = _DECODE if whole else []
        for op, cases in (("prefill", prefills), ("decode", decodes)):
            for case in cases:
                attend(case, op, target, device)
        count += len(stores) + len(prefills) + len(decodes)
    return count


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", default=["cuda", "cuda-sm80", "cuda-ahead", "cuda-sm80-ahead"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    count = run_all(args.targets, args.device)
    print(f"{count} calls right on {', '.join(args.targets)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
