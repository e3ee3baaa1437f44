"""Prefill of mixed batches: sequences of few query tokens take the decode kernels (TQ4_PREFILL_SHORT)."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch

import tq4
from support_attention import (
    BFLOAT16,
    CPU_TARGETS,
    CUDA_TARGETS,
    MODES,
    Case,
    Problem,
    Target,
    answer,
    build,
    judge,
    on_targets,
    poisoned_out,
    refuses_choice,
    run,
    short_queries,
    solved,
    unpacking,
)
from tq4.backends import choices, cuda
from tq4.triton_kernels import configs

TRITON = Target("triton", "cuda")


# ------------------------------------------------------------------------------------------------ the choice


@pytest.mark.parametrize("name", ["", "Prefill", "decode", "1"])
def test_unknown_choice_is_an_error(name: str) -> None:
    """Before anything is loaded or launched."""
    launch = functools.partial(cuda.prefill, path=1)
    refuses_choice("TQ4_PREFILL_SHORT", name, "auto, prefill, got", choices.decodes_short_queries, launch)


def test_choices_are_paths_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every combination of choices is another number for the op."""
    seen = []
    monkeypatch.setattr(cuda, "_attend", lambda op, arguments, rotation: seen.append(arguments["path"]))
    for where in ("auto", "in_kernel", "ahead"):
        for short in ("auto", "prefill"):
            with unpacking(where), short_queries(short):
                cuda.prefill(path=0)
                cuda.prefill(path=1)
    assert len(set(seen)) == 12 and min(seen) == 0 and max(seen) == 13


def test_threshold() -> None:
    """At most 16 rows a KV head, and always one token as far as decode takes its heads."""
    for group in range(1, 65):
        most = configs.short_query_len(group)
        assert most == 1 or 1 < most <= 16 // group < most + 1
    assert configs.short_query_len(65) == 0


# --------------------------------------------------------------------------------------------------- answers

# A group of 4: sequences of up to 4 query tokens are decode's.
_LENGTHS = dict(seq_lens=(40, 17, 0, 60, 25, 33, 5, 0, 18), query_lens=(1, 2, 1, 20, 4, 5, 0, 7, 3))
_MIXED = Case(head_dim=64, kv_heads=1, group=4, padding_rows=2, **_LENGTHS)
CPU_CASES = [
    _MIXED,
    _MIXED.but(sinks=True, window=(9, -1), layout="head_major"),
    _MIXED.but(int8=False, softcap=4.0, strided=True),
    _MIXED.but(causal=False, window=(20, 3), group=7, dtype=BFLOAT16),
    _MIXED.but(group=20, seq_lens=(33, 20), query_lens=(1, 2)),
    _MIXED.but(query_lens=(1, 2, 1, 4, 4, 3, 0, 2, 3)),  # short ones only
    _MIXED.but(query_lens=(6, 5, 9, 20, 0, 5, 5, 7, 8)),  # long ones only
]

_LONG = Case(
    head_dim=128,
    kv_heads=2,
    group=4,
    padding_rows=3,
    seq_lens=(3000, 1, 17, 0, 1500, 4, 900, 33, 5000, 6, 77, 0, 2000),
    query_lens=(1, 1, 2, 3, 700, 4, 5, 0, 4, 6, 90, 9, 3),
)
GPU_CASES = [
    _LONG,
    _LONG.but(sinks=True, window=(300, -1), softcap=30.0, layout="head_major"),
    _LONG.but(head_dim=64, kv_heads=8, group=8, dtype=BFLOAT16, page=64, rotation=None),
    _LONG.but(head_dim=96, kv_heads=3, group=1, interleaved=True, row_padding=20, strided=True),
    _LONG.but(head_dim=256, kv_heads=1, group=7, causal=False, window=(90, 40), sinks=True),
    _LONG.but(group=40, kv_heads=1),
    _LONG.but(group=130, kv_heads=1, seq_lens=(300, 200), query_lens=(1, 9)),  # more rows than decode takes
    _LONG.but(int8=False, sinks=True),
    _LONG.but(int8=False, head_dim=256, group=2, layout="head_major", window=(500, -1)),
    _LONG.but(data="outlier", rotation="haar"),
]


def _on_routes(cpu=(), gpu=()):
    """Parametrise by (case, target, where keys are unpacked); the latter is the CUDA extension's alone."""
    params = [
        pytest.param(case, target, "auto", id=f"{case}-{target}") for case in cpu for target in CPU_TARGETS
    ]
    for case in gpu:
        for target in (*CUDA_TARGETS, TRITON):
            wheres = ("auto", "in_kernel", "ahead") if target in CUDA_TARGETS and case.int8 else ("auto",)
            for where in wheres:
                name = f"{case}-{target}-{where}"
                params.append(pytest.param(case, target, where, id=name, marks=pytest.mark.gpu))
    return pytest.mark.parametrize("case,target,where", params)


@_on_routes(CPU_CASES, GPU_CASES)
def test_mixed_batches(case: Case, target: Target, where: str) -> None:
    """1, 2, S, S + 1, many and no query tokens, also without keys, beside each other; all else poisoned."""
    target.require()
    problem, answers = solved(case, target.device)
    routes = [("auto", max(case.query_lens)), ("auto", None)]
    if target.device == "cuda":
        routes.append(("prefill", max(case.query_lens)))
    for short, bound in routes:
        with unpacking(where), short_queries(short):
            out, lse = run(problem, target.backend, max_query_len=bound)
        judge(problem, answers, out, lse, f"prefill {target} {where} {short} max_query_len={bound}")


def _rows(problem: Problem, taken) -> torch.Tensor:
    """Which tokens belong to sequences whose number of query tokens is taken."""
    mine = [taken(count) for count in problem.case.query_lens for _ in range(count)]
    return torch.tensor(mine, dtype=torch.bool, device=problem.q.device)


def _only(problem: Problem, taken) -> Problem:
    """The problem with the query tokens of the sequences that are taken; the keys of all."""
    case, keep = problem.case, _rows(problem, taken)
    lens = tuple(count if taken(count) else 0 for count in case.query_lens)
    starts = torch.tensor(lens, device=problem.q.device).cumsum(0)
    return dataclasses.replace(
        problem,
        case=case.but(query_lens=lens, padding_rows=0),
        q=problem.q[: problem.num_tokens][keep],
        query_start_loc=torch.nn.functional.pad(starts, (1, 0)).int(),
    )


_FEW = dict(seq_lens=(40, 17, 60, 25, 33, 18), query_lens=(1, 2, 20, 4, 5, 3))
# So many short sequences that decode plans the same splits for them alone: rows enough for every SM.
_MANY = {name: lens * 15 for name, lens in _FEW.items()}
# The form of the rotation that prefill passes: decode rounds otherwise from signs.
_MATRIX = dict(rotation="hadamard_matrix")


@_on_routes(
    [Case(head_dim=64, kv_heads=1, group=4, **_MATRIX, **_FEW)],
    [
        Case(head_dim=128, kv_heads=8, group=4, sinks=True, **_MATRIX, **_MANY),
        Case(head_dim=256, kv_heads=8, group=4, **_MATRIX, **_MANY),
        Case(head_dim=64, kv_heads=8, group=4, int8=False, layout="head_major", **_MATRIX, **_MANY),
    ],
)
def test_each_sequence_takes_its_kernels(case: Case, target: Target, where: str) -> None:
    """Short sequences have decode's bits, the others those of a prefill without the division."""
    target.require()
    if target.backend == "reference":
        pytest.skip("one implementation for all")
    problem = build(case, target.device)
    most = configs.short_query_len(case.group)
    with unpacking(where):
        out, lse = run(problem, target.backend)
        with short_queries("prefill"):
            whole, whole_lse = run(problem, target.backend)
    long = _rows(problem, lambda count: count > most)
    assert torch.equal(out[long], whole[long]) and torch.equal(lse[:, long], whole_lse[:, long])
    short = _only(problem, lambda count: count <= most)
    alone, alone_lse = run(short, target.backend, "decode", max_query_len=most)
    assert torch.equal(out[~long], alone) and torch.equal(lse[:, ~long], alone_lse)
    # And all of them at once where there is nothing else.
    again, again_lse = run(short, target.backend, max_query_len=most)
    assert torch.equal(again, alone) and torch.equal(again_lse, alone_lse)


@on_targets(cpu=False)
def test_more_sequences_than_threads(target: Target) -> None:
    """600 sequences of both kinds: the sums over them go in several rounds."""
    target.require()
    lens = tuple((i * 37) % 90 for i in range(600))
    queries = tuple(min((i * 11) % 23, 20) if i % 5 == 0 else i % 3 for i in range(600))
    problem = build(Case(head_dim=64, kv_heads=2, group=3, seq_lens=lens, query_lens=queries), target.device)
    out, lse = run(problem, target.backend)
    judge(problem, {mode: answer(problem, mode) for mode in MODES}, out, lse, f"prefill {target}")


@pytest.mark.gpu
@pytest.mark.parametrize("target", CUDA_TARGETS, ids=str)
def test_passes_without_keys(target: Target) -> None:
    """A block table so wide that the workspace is planned for several passes; there are keys for one."""
    target.require()
    problem, answers = solved(_LONG, "cuda")
    keys = (3 << 29) // (len(_LONG.seq_lens) * _LONG.kv_heads * 3 * _LONG.head_dim)  # 1.5 GiB unpacked
    rows, width = problem.block_table.shape
    wide = problem.block_table.new_full((rows, keys // _LONG.page), -1)
    wide[:, :width] = problem.block_table
    with unpacking("ahead"):
        out, lse = run(problem, target.backend)
        again, again_lse = run(dataclasses.replace(problem, block_table=wide), target.backend)
    judge(problem, answers, out, lse, f"prefill {target}")
    assert torch.equal(out, again) and torch.equal(lse, again_lse)


@pytest.mark.gpu
@pytest.mark.parametrize("target", [*CUDA_TARGETS, TRITON], ids=str)
@pytest.mark.parametrize("where", ["auto", "in_kernel", "ahead"])
def test_sequences_change_kind_between_replays(target: Target, where: str) -> None:
    """A captured call stays right when sequences that were short become long, and the other way round."""
    target.require()
    if target == TRITON and where != "auto":
        pytest.skip("the CUDA extension's choice")
    base = Case(head_dim=128, kv_heads=2, group=4, seq_lens=(2000, 900, 700, 300))
    kinds = [(1, 600, 2, 3), (600, 1, 4, 1), (5, 4, 297, 300), (0, 606, 0, 0), (152, 152, 151, 151)]
    problem = build(base.but(query_lens=kinds[0]), "cuda")
    out, bound = poisoned_out(problem), 606

    def call() -> torch.Tensor:
        _, lse = tq4.prefill(
            problem.q,
            problem.cache,
            problem.block_table,
            problem.seq_lens,
            problem.query_start_loc,
            problem.quantizer,
            num_kv_heads=base.kv_heads,
            max_query_len=bound,
            out=out,
            return_lse=True,
            backend=target.backend,
        )
        return lse

    with unpacking(where):
        call()  # compile
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            lse = call()
        for kind in (*kinds, kinds[0]):
            starts = torch.tensor((0, *kind), device="cuda").cumsum(0)
            problem.query_start_loc.copy_(starts)
            problem.case = base.but(query_lens=kind)
            out.fill_(math.nan)
            lse.fill_(math.nan)
            graph.replay()
            torch.cuda.synchronize()
            who = f"prefill {target} {where} replayed with {kind}"
            judge(problem, {mode: answer(problem, mode) for mode in MODES}, out, lse, who)
            eager, eager_lse = run(problem, target.backend, max_query_len=bound)
            assert torch.equal(eager, out) and torch.equal(eager_lse, lse), f"{who}: differs from eager"
