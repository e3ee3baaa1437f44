"""Where prefill unpacks K and V: in the attention kernel or ahead, into a workspace (TQ4_PREFILL_UNPACK)."""

from __future__ import annotations

import functools

import pytest
import torch

import tq4
from support import LSE_TOLERANCE, OUTPUT_ROUNDING, TOLERANCES, relative_error, worst_row
from support_attention import (
    CUDA_TARGETS,
    MODES,
    UNPACK_TARGETS,
    Case,
    Target,
    answer,
    build,
    judge,
    poisoned_out,
    refuses_choice,
    run,
    score_sizes,
    unpacking,
)
from tq4.backends import cuda

CHOICES = ("auto", "in_kernel", "ahead")
AHEAD = [t for t in UNPACK_TARGETS if t.unpack == "ahead"]
on_backends = pytest.mark.parametrize("target", CUDA_TARGETS, ids=str)
on_ahead = pytest.mark.parametrize("target", AHEAD, ids=str)


# ------------------------------------------------------------------------------------------------ the choice


@pytest.mark.parametrize("name", ["", "Ahead", "in-kernel", "4"])
def test_unknown_choice_is_an_error(name: str) -> None:
    """Before anything is loaded or launched."""
    launch = functools.partial(cuda.prefill, path=1)
    refuses_choice("TQ4_PREFILL_UNPACK", name, "auto, in_kernel, ahead", cuda._unpack, launch)


def test_choices_are_paths_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each choice is another number for the op, beside the restriction to portable kernels (0 or 1)."""
    monkeypatch.delenv("TQ4_PREFILL_UNPACK", raising=False)
    assert cuda._unpack() == 0
    numbers = []
    for name in CHOICES:
        monkeypatch.setenv("TQ4_PREFILL_UNPACK", name)
        numbers.append(cuda._unpack())
    assert numbers[0] == 0 and len(set(numbers)) == len(CHOICES)
    assert all(number % 2 == 0 for number in numbers)


def test_targets_are_the_choices_and_their_names_differ() -> None:
    assert {t.unpack for t in UNPACK_TARGETS} <= set(CHOICES)
    names = [t.name for t in (*CUDA_TARGETS, *UNPACK_TARGETS)]
    assert len(set(names)) == len(names)
    assert {"cuda-ahead", "cuda-sm80-ahead"} <= set(names)


def _allocated_by(call) -> int:
    """Most bytes that a call holds on the GPU beyond what was there before."""
    call()  # load, and fill what is kept
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _prefill(problem, out: torch.Tensor, backend: str) -> None:
    """Into an output that is there: nothing but the call allocates, or comes between two calls."""
    case = problem.case
    tq4.prefill(
        problem.q,
        problem.cache,
        problem.block_table,
        problem.seq_lens,
        problem.query_start_loc,
        problem.quantizer,
        num_kv_heads=case.kv_heads,
        max_query_len=max(case.query_lens),
        int8=case.int8,
        out=out,
        backend=backend,
    )


def _workspace(problem, backend: str, where: str | None) -> int:
    out = poisoned_out(problem)
    with unpacking(where):
        return _allocated_by(lambda: _prefill(problem, out, backend))


@pytest.mark.gpu
@on_backends
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_each_choice_takes_its_kernel(target: Target, head_dim: int) -> None:
    """Told by the workspace: at least an int8 and an fp16 a dim of every key, or nothing."""
    target.require()
    case = Case(head_dim=head_dim, kv_heads=2, group=4, seq_lens=(4096,), query_lens=(127,))
    unpacked = sum(case.seq_lens) * case.kv_heads * 3 * head_dim
    for queries, automatic in ((127, "in_kernel"), (128, "ahead")):  # 508 and 512 rows a KV head
        problem = build(case.but(query_lens=(queries,)), "cuda")
        sizes = {where: _workspace(problem, target.backend, where) for where in CHOICES}
        assert sizes["ahead"] >= unpacked and sizes["in_kernel"] < unpacked, sizes
        assert sizes["auto"] == sizes[automatic], f"{queries} queries: {sizes}"
    fp16 = build(case.but(query_lens=(128,), int8=False), "cuda")  # has no such kernel
    assert _workspace(fp16, target.backend, "ahead") < unpacked


# ------------------------------------------------------------------------------------------------- agreement

_EVERYTHING = Case(
    head_dim=128,
    kv_heads=2,
    group=4,
    seq_lens=(1000, 0, 77, 650, 1),
    query_lens=(700, 3, 90, 203, 1),
    rotation=None,
    window=(300, -1),
    softcap=30.0,
    sinks=True,
    padding_rows=3,
)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        _EVERYTHING,
        _EVERYTHING.but(head_dim=64, layout="head_major", page=64, group=7, kv_heads=1),
        _EVERYTHING.but(head_dim=96, row_padding=20, interleaved=True, strided=True),
        _EVERYTHING.but(head_dim=256, kv_heads=1, causal=False, window=(90, 40)),
        _EVERYTHING.but(data="outlier", window=(-1, -1), sinks=False, softcap=0.0),
    ],
    ids=str,
)
def test_choices_agree(case: Case) -> None:
    """Each backend and choice against the answer and against the others; each gives the same bits again."""
    for target in CUDA_TARGETS:
        target.require()
    problem = build(case, "cuda")
    answers = {mode: answer(problem, mode) for mode in MODES}
    results = {}
    for target in CUDA_TARGETS:
        for where in CHOICES:
            who = f"{target} {where}"
            with unpacking(where):
                out, lse = run(problem, target.backend)
                judge(problem, answers, out, lse, who)
                for _ in range(5):
                    again, again_lse = run(problem, target.backend)
                    assert torch.equal(out, again) and torch.equal(lse, again_lse), f"{who}: bits differ"
            results[who] = out, lse
    bound, rounding = TOLERANCES["recipe"], OUTPUT_ROUNDING[case.dtype]
    unit = 1 + score_sizes(problem)
    first, (want, want_lse) = next(iter(results.items()))
    for who, (out, lse) in results.items():
        assert relative_error(out, want) <= bound.total + rounding, f"{who} against {first}"
        assert worst_row(out, want) <= bound.row + rounding, f"{who} against {first}"
        assert torch.equal(lse.isneginf(), want_lse.isneginf()), f"{who} against {first}"
        off = torch.where(want_lse.isneginf(), 0.0, (lse - want_lse).abs() / unit)
        assert off.amax().item() <= LSE_TOLERANCE["recipe"], f"{who} against {first}"


# ------------------------------------------------------------------------------------------- the workspace


_LIMIT = 512 << 20  # kTileWorkspaceLimit of csrc/device/tile_workspace.h


def _widened(problem, keys: int):
    """The same problem with a block table for so many keys a sequence, all of it garbage beyond the used."""
    rows, width = problem.block_table.shape
    wide = problem.block_table.new_full((rows, -(-keys // problem.case.page)), -1)
    wide[:, :width] = problem.block_table
    problem.block_table = wide
    return problem


@pytest.mark.gpu
@on_ahead
def test_workspace_in_several_passes(target: Target) -> None:
    """More unpacked keys than the workspace is allowed to hold: they go through it in turns.

    Its bound is 512 MiB, and a block table for 75 % of that a sequence makes a pass of about 25 %; the units
    of two sequences and two heads then begin in passes 0, 0, 1 and 2.
    """
    target.require()
    case = Case(
        head_dim=128,
        kv_heads=2,
        group=2,
        page=64,
        seq_lens=(300_000, 200_000),
        query_lens=(40, 150),
        sinks=True,
    )
    room = _LIMIT // (3 * case.head_dim + 4)
    problem = _widened(build(case, "cuda"), room * 3 // 4)
    size = _workspace(problem, target.backend, "ahead")
    assert 0.9 * _LIMIT <= size <= 1.1 * _LIMIT, "the keys were not unpacked ahead"
    answers = {mode: answer(problem, mode) for mode in MODES}
    out, lse = run(problem, target.backend)
    judge(problem, answers, out, lse, f"prefill {target} in passes")


@pytest.mark.gpu
@on_ahead
def test_more_sequences_than_threads(target: Target) -> None:
    """600 sequences, some without keys or queries: the sums over them go in several rounds."""
    target.require()
    lens = tuple((i * 37) % 90 for i in range(600))
    queries = tuple(min((i * 11) % 23, 20) for i in range(600))
    problem = build(Case(head_dim=64, kv_heads=2, group=3, seq_lens=lens, query_lens=queries), "cuda")
    out, lse = run(problem, target.backend)
    judge(problem, {mode: answer(problem, mode) for mode in MODES}, out, lse, f"prefill {target}")


@pytest.mark.gpu
@on_ahead
def test_one_call_after_another(target: Target) -> None:
    """Calls of other shapes reuse the memory of a workspace right after it was read: none is disturbed."""
    target.require()
    cases = [
        Case(head_dim=128, group=4, seq_lens=(1500,), query_lens=(700,), seed=1),
        Case(head_dim=64, group=1, seq_lens=(300, 900), query_lens=(300, 20), seed=2),
        Case(head_dim=256, group=2, kv_heads=1, seq_lens=(500,), query_lens=(500,), rotation=None, seed=3),
        Case(head_dim=96, group=3, seq_lens=(40, 0, 700), query_lens=(40, 1, 333), seed=4),
    ]
    problems = [build(case, "cuda") for case in cases]
    alone = []
    for problem in problems:
        out, lse = run(problem, target.backend)
        judge(problem, {mode: answer(problem, mode) for mode in MODES}, out, lse, f"prefill {target}")
        alone.append(out.clone())
    outs = [[poisoned_out(problem) for problem in problems] for _ in range(10)]
    torch.cuda.synchronize()
    for round_outs in outs:
        for problem, out in zip(problems, round_outs, strict=True):
            _prefill(problem, out, target.backend)
    for round_outs in outs:
        for problem, out, want in zip(problems, round_outs, alone, strict=True):
            assert torch.equal(out, want), f"{target} {problem.case}: disturbed by a call beside it"
