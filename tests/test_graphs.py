"""CUDA graphs, streams, a second GPU, and no synchronisation with the host on the hot path."""

from __future__ import annotations

import math

import pytest
import torch

import tq4
from support_attention import (
    BFLOAT16,
    CUDA_TARGETS,
    MODES,
    UNPACK_TARGETS,
    Case,
    Problem,
    Target,
    answer,
    build,
    judge,
    poisoned_out,
    run,
    storage,
)

pytestmark = pytest.mark.gpu

# The reference backend reads lengths on the host, by design.
_TARGETS = [*CUDA_TARGETS, Target("triton", "cuda")]
on_gpu = pytest.mark.parametrize("target", _TARGETS, ids=str)
on_gpu_prefill = pytest.mark.parametrize("target", [*_TARGETS, *UNPACK_TARGETS], ids=str)


def on_gpu_ops(*ops: str):
    """Parametrise by (op, target): prefill also by where it unpacks."""
    pairs = [(op, t) for op in ops for t in (*_TARGETS, *(UNPACK_TARGETS if op == "prefill" else ()))]
    return pytest.mark.parametrize("op,target", [pytest.param(op, t, id=f"{op}-{t}") for op, t in pairs])


_DECODE = Case(head_dim=128, kv_heads=2, group=4, query_lens=(1,) * 5)
_PREFILL = Case(head_dim=128, kv_heads=2, group=4)


def same_shapes(cases: list[Case], device: str = "cuda") -> list[Problem]:
    """Problems of equal shapes: caches with as many blocks and tables as wide as the largest needs."""
    needed = max(sum(-(-n // c.page) for n in c.seq_lens) for c in cases) + 3
    problems = [
        build(c, device, spare_blocks=needed - sum(-(-n // c.page) for n in c.seq_lens)) for c in cases
    ]
    width = max(p.block_table.shape[1] for p in problems)
    for p in problems:
        spare = p.block_table.new_full((p.block_table.shape[0], width - p.block_table.shape[1]), 0)
        p.block_table = torch.cat([p.block_table, spare], 1)
    return problems


def become(static: Problem, other: Problem) -> None:
    """Overwrite a problem's tensors in place with another's contents; the host-side case goes along."""
    for name in (
        "cache",
        "block_table",
        "seq_lens",
        "query_start_loc",
        "q",
        "k_index",
        "k_norm",
        "v_index",
        "v_norm",
    ):
        here, there = getattr(static, name), getattr(other, name)
        if here.shape == there.shape:
            here.copy_(there)
        else:  # dense answers' inputs, which no graph reads
            setattr(static, name, there)
    static.case = other.case


@on_gpu_ops("decode", "prefill")
def test_replay_with_other_contents(op: str, target: Target) -> None:
    """Lengths, tables, pages and queries change between replays; each is right and equals an eager call."""
    target.require()
    if op == "decode":
        base = _DECODE
        cases = [
            base.but(seq_lens=(700, 1, 33, 0, 2000)),
            base.but(seq_lens=(3, 3000, 16, 17, 1), seed=1),
            base.but(seq_lens=(0, 0, 0, 0, 5), seed=2),
            base.but(seq_lens=(129, 500, 640, 700, 900), seed=3),
        ]
    else:
        base = _PREFILL
        cases = [
            base.but(seq_lens=(300, 40, 700), query_lens=(300, 10, 90)),
            base.but(seq_lens=(390, 5, 9), query_lens=(390, 5, 5), seed=1),
            base.but(seq_lens=(1000, 0, 999), query_lens=(1, 0, 399), seed=2),
            base.but(seq_lens=(150, 150, 100), query_lens=(150, 150, 100), seed=3),
            base.but(seq_lens=(2000, 700, 395), query_lens=(4, 1, 395), seed=4),
        ]
    problems = same_shapes(cases)
    static = problems[0]
    bound = max(max(c.query_lens) for c in cases)
    for p in problems[:2]:  # compile and allocate before the capture
        run(p, target.backend, op, max_query_len=bound)
    out = poisoned_out(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, lse = run_unchecked(static, target.backend, op, out, bound)
    for problem in [*problems[1:], problems[1]]:
        become(static, problem)
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        who = f"{op} {target} in a CUDA graph"
        judge(problem, {mode: answer(problem, mode) for mode in MODES}, out, lse, who)
        eager, eager_lse = run(problem, target.backend, op, max_query_len=bound)
        assert torch.equal(eager, out) and torch.equal(eager_lse, lse), f"{who}: differs from the eager call"


def run_unchecked(problem: Problem, backend: str, op: str, out: torch.Tensor, bound: int):
    """``run`` without looking at the result, which a capture does not have yet."""
    args = [problem.q, problem.cache, problem.block_table, problem.seq_lens]
    args += [problem.query_start_loc] if op == "prefill" else []
    return getattr(tq4, op)(
        *args,
        problem.quantizer,
        num_kv_heads=problem.case.kv_heads,
        max_query_len=bound,
        out=out,
        return_lse=True,
        backend=backend,
    )


@on_gpu
def test_a_decode_step_in_a_graph(target: Target) -> None:
    """store, then decode, captured together; each replay has new tokens and slots, and longer sequences."""
    target.require()
    case = Case(head_dim=128, kv_heads=2, group=4, seq_lens=(40, 15, 16, 300), query_lens=(1,) * 4)
    start = build(case, "cuda", spare_blocks=8)
    quant, gen = start.quantizer, torch.Generator("cuda").manual_seed(3)
    free = sorted(set(range(start.cache.shape[0])) - set((start.slots // case.page).tolist()))
    table = start.block_table.new_zeros(4, 22)
    for i, n in enumerate(case.seq_lens):  # every sequence owns a page beyond its last
        used = -(-n // case.page)
        table[i, :used] = start.block_table[i, :used]
        table[i, used] = free.pop()
    lens = start.seq_lens.clone()
    key, value = torch.zeros(2, 4, 2, 128, device="cuda", dtype=torch.float16)
    slots = torch.zeros(4, dtype=torch.int64, device="cuda")
    q, out = (torch.zeros(4, 8, 128, device="cuda", dtype=torch.float16) for _ in range(2))

    def step() -> None:
        tq4.store(key, value, start.cache, slots, quant, backend=target.backend)
        tq4.decode(q, start.cache, table, lens, quant, num_kv_heads=2, out=out, backend=target.backend)

    slots.fill_(-1)
    for _ in range(2):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(6):
        at = lens.long()
        page = table.gather(1, (at // case.page)[:, None]).squeeze(1).long()
        slots.copy_(page * case.page + at % case.page)
        lens += 1
        for x in (key, value, q):
            x.copy_(torch.randn(x.shape, generator=gen, device="cuda"))
        out.fill_(math.nan)
        graph.replay()
        got = out.clone()
        want = tq4.decode(q, start.cache, table, lens, quant, num_kv_heads=2, int8=False, backend="reference")
        error = ((got.float() - want.float()).norm() / want.float().norm()).item()
        assert error < 1.2e-2, f"{target}: step at lengths {lens.tolist()}: error {error:.3g}"


@on_gpu_ops("decode", "prefill", "store")
def test_current_stream(op: str, target: Target) -> None:
    """Work goes to the current stream: on one that is busy for a while the inputs arrive just in time."""
    target.require()
    case = (
        _DECODE.but(seq_lens=(700, 1, 33, 16, 900))
        if op == "decode"
        else _PREFILL.but(seq_lens=(300, 40), query_lens=(120, 10))
    )
    problem = build(case, "cuda")
    slots = problem.slots
    key, value = (torch.randn(len(slots), 2, 128, device="cuda", dtype=torch.float16) for _ in range(2))
    cache = torch.full_like(problem.cache, 0xFF)
    q, bytes_before = problem.q.clone(), problem.cache.clone()

    def call():
        if op == "store":
            return tq4.store(key, value, cache, slots, problem.quantizer, backend=target.backend)
        return run_unchecked(problem, target.backend, op, out, max(case.query_lens))

    out = poisoned_out(problem)
    call()  # compile
    want = cache.clone() if op == "store" else out.clone()
    torch.cuda.synchronize()
    good_key, good_value = key.clone(), value.clone()
    for x in (out, problem.q, key, value):
        x.fill_(math.nan)
    cache.fill_(0xFF)
    problem.cache.fill_(0xFF)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # about 10 ms
        problem.q.copy_(q)
        problem.cache.copy_(bytes_before)
        key.copy_(good_key)
        value.copy_(good_value)
        call()
        got = (cache if op == "store" else out).clone()
    side.synchronize()
    assert torch.equal(got, want), f"{op} {target}: not on the current stream"


@on_gpu_prefill
@pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16], ids=["f16", "bf16"])
def test_repeats_are_bitwise(target: Target, dtype: torch.dtype) -> None:
    """Splits and combines in a fixed order: the same call gives the same bits, with other work beside it."""
    target.require()
    decode_case = _DECODE.but(seq_lens=(20_000, 1, 333, 0, 4000), kv_heads=8, dtype=dtype)
    prefill_case = _PREFILL.but(seq_lens=(1500, 40, 0, 700), query_lens=(1500, 3, 2, 100), dtype=dtype)
    for op, case in (("decode", decode_case), ("prefill", prefill_case)):
        if op == "decode" and target.unpack is not None:
            continue
        problem = build(case, "cuda")
        first, first_lse = run(problem, target.backend, op)
        noise = torch.randn(4096, 4096, device="cuda")
        side = torch.cuda.Stream()
        for _ in range(8):
            with torch.cuda.stream(side):
                noise = (noise @ noise).clamp(-1, 1)
            again, again_lse = run(problem, target.backend, op)
            assert torch.equal(first, again) and torch.equal(first_lse, again_lse), (
                f"{op} {target}: bits differ"
            )
        torch.cuda.synchronize()


@on_gpu_prefill
def test_no_synchronisation(target: Target) -> None:
    """store, prefill and decode never wait for the device (torch raises when they do)."""
    target.require()
    case = _DECODE.but(seq_lens=(700, 1, 33, 16, 900))
    problem = build(case, "cuda")
    key, value = (
        torch.randn(len(problem.slots), 2, 128, device="cuda", dtype=torch.float16) for _ in range(2)
    )
    out = poisoned_out(problem)

    def calls() -> None:
        tq4.store(key, value, problem.cache, problem.slots, problem.quantizer, backend=target.backend)
        run_unchecked(problem, target.backend, "decode", out, 1)
        run_unchecked(problem, target.backend, "prefill", out, 1)
        run_unchecked(problem, target.backend, "prefill", out, -1)

    calls()  # compile
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu_prefill
def test_second_gpu(target: Target) -> None:
    """Tensors on cuda:1 while cuda:0 is current."""
    target.require()
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    assert torch.cuda.current_device() == 0
    for op, case in (
        ("prefill", _PREFILL.but(seq_lens=(300, 40), query_lens=(120, 10))),
        ("decode", _DECODE.but(seq_lens=(700, 1, 33, 16, 900))),
    ):
        problem = build(case, "cuda").to("cuda:1")
        before = storage(problem.cache).clone()
        out, lse = run(problem, target.backend, op)
        judge(problem, {mode: answer(problem, mode) for mode in MODES}, out, lse, f"{op} {target} on cuda:1")
        assert torch.equal(storage(problem.cache), before)
        key, value = torch.randn(2, len(problem.slots), 2, 128, device="cuda:1").half()
        caches = []
        for backend in (target.backend, "reference"):
            cache = torch.full_like(problem.cache, 0xFF)
            tq4.store(key, value, cache, problem.slots, problem.quantizer, backend=backend)
            caches.append(cache)
        assert (caches[0] != caches[1]).float().mean() < 1e-3


def test_automatic_backend_is_cuda() -> None:
    """Without a request a CUDA tensor takes the extension where it can run, and gives its bits."""
    Target("cuda", "cuda").require()
    problem = build(_PREFILL.but(seq_lens=(300, 40), query_lens=(120, 10)), "cuda")
    out, _ = run(problem, None)
    assert torch.equal(out, run(problem, "cuda")[0])
