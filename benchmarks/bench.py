"""Time TQ4's operations and what a user would pick instead, in one run; print a table and keep a record.

    python benchmarks/bench.py prefill|chunk|varlen|mixed|decode|step|store|all [options]

Every call is checked against the right answer on a few rows before it is timed.  A peer that is missing or
wrong is reported and left out; when one of TQ4's own calls is wrong nothing of that operation is recorded.
The exit status is 1 when one of them was wrong or raised.  Records go to benchmarks/results/<gpu>-<op>.json
(see record.py), or nowhere with ``--no-record``.

    chunk    2048 new tokens at the end of a context      varlen   16 sequences of unequal length, one call
    step     store the new tokens, then decode, in one CUDA graph
    mixed    63 sequences that decode and one chunk of a prompt in one prefill call, as a serving engine asks;
             also with TQ4_PREFILL_SHORT=prefill, which leaves all of them to the prefill kernels
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import record
import tq4
from peers import Maker, UnavailableError, peers_of
from timing import Budget, captured, median_ms
from workloads import (
    DTYPES,
    Contender,
    Copies,
    StoreInputs,
    Tq4Inputs,
    Workload,
    WrongResultError,
    check,
    chunk_workloads,
    decode_workloads,
    make_queries,
    mixed_decode_workload,
    mixed_workloads,
    prefill_workloads,
    varlen_workloads,
)

OPS = ("prefill", "chunk", "varlen", "mixed", "decode", "step", "store")
PREFILL_LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768]
PREFILL_VARIANTS = [(128, "bfloat16"), (64, "float16"), (256, "float16")]
VARIANT_LENGTHS = [4096, 16384]
CHUNK_LENGTHS = [8192, 32768, 131072]
MIXED_LENGTH = 32768
DECODE_SIZES = [
    (1, 8192, 1),
    (1, 131072, 1),
    (8, 32768, 1),
    (32, 8192, 1),
    (64, 8192, 1),
    (128, 4096, 1),
    (64, 8192, 4),
]
# For the plot: context length at a fixed batch.
SWEEP_SIZES = [(1, n << 10, 1) for n in (1, 2, 4, 16, 32, 64)] + [(64, n << 10, 1) for n in (1, 2, 4, 16)]
STEP_SIZES = [(1, 8192, 1), (64, 8192, 1)]
STORE_TOKENS = [1, 16, 64, 256, 2048, 16384]
IN_A_ROW = 8  # stores, or copies to compare them with, in one timing


class Session:
    """Options of a run and the rows it has measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device: str = args.device
        self.budget = Budget(args.warmup, args.rep)
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.wrong: set[str] = set()  # operations that gave a wrong result
        self.missing: dict[str, str] = {}  # impl -> why it was left out
        self.failed = False  # a call of TQ4 raised

    def backends(self) -> Iterator[str]:
        """The requested backends that run here; the others are reported once."""
        usable = tq4.available_backends()
        for name in self.args.backends:
            ok, why = usable[name]
            if self.device == "cpu" and name != "reference":
                ok, why = False, "needs a CUDA GPU"
            if ok:
                yield name
            else:
                self.missing.setdefault(f"tq4-{name}", why)

    def add(self, row: dict[str, Any], label: str) -> None:
        self.rows.setdefault(row["op"], []).append(row)
        rate = f"{row['tflops']:8.1f} TFLOPS" if "tflops" in row else f"{row['gbps']:8.1f} GB/s"
        print(f"{row['op']:8s} {label:44s} {row['impl']:22s} {row['ms']:10.4f} ms {rate}", flush=True)

    def attempt(self, work: Workload, q: torch.Tensor, impl: str, make: Maker, ours: bool) -> None:
        """Check and time one contender; what cannot be measured is reported, with a reason."""
        where = f"{work.op:8s} {work.label:44s} {impl:22s}"
        try:
            contender = make(work, q)
            error = check(contender, work, q)
            ms, how = self.measure(work, contender.call, impl)
        except UnavailableError as why:
            self.missing.setdefault(impl, str(why))
            print(f"{where} not run: {why}", flush=True)
            return
        except WrongResultError as wrong:
            if ours:
                self.wrong.add(work.op)
            print(f"{where} WRONG: {wrong}", flush=True)
            return
        except Exception as failure:
            reason = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:120]}"
            self.missing.setdefault(impl, reason)
            if ours:
                self.failed = True
                traceback.print_exc()
            print(f"{where} failed: {reason}", flush=True)
            return
        if work.op in ("decode", "step"):
            rate = {"gbps": round(contender.read_bytes / ms / 1e6, 1)}
        else:
            rate = {"tflops": round(work.flops / ms / 1e9, 2)}
        self.add(work.row(impl, ms, **rate, **how, error=float(f"{error:.3g}")), work.label)

    def measure(self, work: Workload, call: Callable[[], object], impl: str) -> tuple[float, dict[str, Any]]:
        """Median ms of a call, as a CUDA graph where the workload says so, and what the row says of that."""
        if not work.graph or self.device != "cuda":
            return median_ms(call, self.budget, self.device), {}
        eager_ms = median_ms(call, self.budget)
        try:
            replay = captured(call)
        except Exception as failure:
            if impl.startswith("tq4-"):
                raise  # ours are capturable, or broken
            print(f"{work.op:8s} {work.label:44s} {impl:22s} no CUDA graph: {failure}", flush=True)
            return eager_ms, {"cuda_graph": False}
        return median_ms(replay, self.budget), {"cuda_graph": True, "eager_ms": round(eager_ms, 5)}


def ours(inputs: Tq4Inputs, backend: str) -> Maker:
    """TQ4 on one backend, as ``peers_of`` gives the peers."""

    def make(work: Workload, q: torch.Tensor) -> Contender:
        impl = f"tq4-{backend}"
        if work.op == "step":
            return inputs.step(q, backend, impl)
        return inputs.attention("decode" if work.op == "decode" else "prefill", q, backend, impl)

    return make


def exact(inputs: Tq4Inputs, backend: str) -> Maker:
    """TQ4's decode in the exact mode."""

    def make(work: Workload, q: torch.Tensor) -> Contender:
        return inputs.attention("decode", q, backend, f"tq4-{backend}-exact", int8=False)

    return make


def unrouted(inputs: Tq4Inputs, backend: str) -> Maker:
    """TQ4's prefill with every sequence in the prefill kernels."""

    def make(work: Workload, q: torch.Tensor) -> Contender:
        contender = inputs.attention("prefill", q, backend, f"tq4-{backend}-prefill")
        routed = contender.call

        def call() -> torch.Tensor:
            with mock.patch.dict(os.environ, TQ4_PREFILL_SHORT="prefill"):
                return routed()

        contender.call = call
        return contender

    return make


def run_attention(session: Session, works: list[Workload]) -> None:
    """Time all contenders on each workload, ours first, each with its inputs freed before the next."""
    args = session.args
    for work in works:
        q = make_queries(work, session.device)
        inputs = Tq4Inputs(work, session.device, args.layout)
        for backend in session.backends():
            session.attempt(work, q, f"tq4-{backend}", ours(inputs, backend), ours=True)
            if work.op == "decode" and backend == "cuda" and not work.extra:
                session.attempt(work, q, f"tq4-{backend}-exact", exact(inputs, backend), ours=True)
            if work.op == "mixed" and backend != "reference":
                session.attempt(work, q, f"tq4-{backend}-prefill", unrouted(inputs, backend), ours=True)
        del inputs
        peers = peers_of(work.op, args.flashinfer, args.turboquant) if args.peers else {}
        for impl, make in peers.items():
            release()
            session.attempt(work, q, impl, make, ours=False)
        release()


def run_store(session: Session, hq: int, hkv: int, d: int) -> None:
    """Bytes of K, V, codes and norms read and written a second."""
    args = session.args
    for tokens in args.lengths or STORE_TOKENS:
        inputs = StoreInputs(tokens, hkv, d, args.dtype, args.page, args.layout, session.device)
        work = Workload("store", hq, hkv, d, args.dtype, args.page, (tokens,), (tokens,))
        for backend in session.backends():
            impl = f"tq4-{backend}"
            try:
                inputs.check(backend, impl)
            except WrongResultError as wrong:
                session.wrong.add("store")
                print(f"store    {tokens} tokens {impl:22s} WRONG: {wrong}", flush=True)
                continue
            time_store(session, work, functools.partial(inputs.call, backend), impl, inputs.bytes_moved)
        time_stores_in_a_row(session, work)
        if session.device == "cuda" and args.peers:
            copies = Copies(inputs.bytes_moved, IN_A_ROW, session.device)
            time_store(session, work, copies.one, "copy", inputs.bytes_moved)
            time_store(session, work, copies.all, "copy-in-a-row", inputs.bytes_moved, IN_A_ROW)
            del copies
        del inputs
        release()


def time_store(
    session: Session, work: Workload, call: Callable[[], object], impl: str, moved: int, times: int = 1
) -> None:
    """Add a row of ``call``, which does the work ``times`` times."""
    ms, how = session.measure(work, call, impl)
    if "eager_ms" in how:
        how["eager_ms"] = round(how["eager_ms"] / times, 5)
    row = work.row(impl, ms / times, gbps=round(moved * times / ms / 1e6, 2), **how)
    tokens = work.q_lens[0]
    session.add(row, f"{work.hkv} heads D{work.d} {work.dtype} {tokens} tokens")


def time_stores_in_a_row(session: Session, work: Workload) -> None:
    """The CUDA backend on inputs of its own each time: what one store costs beside others.

    A single call between two events pays the launch and the first misses alone, as does a single copy.
    """
    args = session.args
    if session.device != "cuda" or "cuda" not in session.backends():
        return
    shape = (work.hkv, work.d, work.dtype, work.page, args.layout, session.device)
    several = [StoreInputs(work.q_lens[0], *shape) for _ in range(IN_A_ROW)]

    def call() -> None:
        for inputs in several:
            inputs.call("cuda")

    time_store(session, work, call, "tq4-cuda-in-a-row", several[0].bytes_moved, IN_A_ROW)


def release() -> None:
    """Give freed tensors back, so that the next contender has the whole GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(session: Session, op: str) -> None:
    args = session.args
    for hq, hkv in args.heads:
        shape = (hq, hkv, args.head_dim, args.dtype, args.page)
        if op == "store":
            run_store(session, hq, hkv, args.head_dim)
        elif op == "prefill":
            run_attention(session, prefill_workloads(*shape, args.lengths or PREFILL_LENGTHS))
            for d, dtype in PREFILL_VARIANTS if args.variants else ():
                works = prefill_workloads(hq, hkv, d, dtype, args.page, args.lengths or VARIANT_LENGTHS)
                run_attention(session, works)
        elif op == "chunk":
            run_attention(session, chunk_workloads(*shape, args.lengths or CHUNK_LENGTHS))
        elif op == "varlen":
            run_attention(session, varlen_workloads(*shape, max(args.lengths or [16384])))
        elif op == "mixed":
            run_attention(session, mixed_workloads(*shape, max(args.lengths or [MIXED_LENGTH])))
        elif op == "step":
            sizes = [(2, n, 1) for n in args.lengths] if args.lengths else STEP_SIZES
            run_attention(session, decode_workloads(*shape, sizes, op="step"))
        else:
            small = [(b, n, t) for n in args.lengths or () for b, t in ((1, 1), (2, 4))]
            sizes = small or DECODE_SIZES
            works = decode_workloads(*shape, sizes)
            if args.sweep:
                works += decode_workloads(*shape, SWEEP_SIZES, sweep=True)
            works.append(mixed_decode_workload(*shape, scale=500 if args.lengths else 1))
            run_attention(session, works)


def print_table(session: Session) -> None:
    """Everything measured, one line a row, grouped by operation and workload."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140)
    for op, rows in session.rows.items():
        rate = "gbps" if op in ("decode", "step", "store") else "tflops"
        table = Table(title=op, title_justify="left")
        unit = "GB/s" if rate == "gbps" else "TFLOPS"
        for name in ("heads", "D", "dtype", "batch", "q", "kv", "impl", "ms", unit):
            table.add_column(name, justify="left" if name in ("heads", "dtype", "impl") else "right")
        last = None
        for row in rows:
            key = tuple(row[k] for k in ("hq", "hkv", "d", "batch", "q_len", "kv_len"))
            if last not in (None, key):
                table.add_section()
            last = key
            table.add_row(
                f"{row['hq']}/{row['hkv']}",
                *(str(row[k]) for k in ("d", "dtype", "batch", "q_len", "kv_len", "impl")),
                f"{row['ms']:.4f}",
                f"{row[rate]:.1f}",
            )
        console.print(table)
    for impl, why in session.missing.items():
        console.print(f"not measured: {impl}: {why}", highlight=False)


def parse(argv: list[str] | None) -> argparse.Namespace:
    def heads(text: str) -> tuple[int, int]:
        hq, hkv = map(int, text.split(","))
        return hq, hkv

    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("op", choices=(*OPS, "all"))
    parser.add_argument(
        "--heads", type=heads, action="append", metavar="HQ,HKV", help="may be repeated [32,8]"
    )
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float16")
    parser.add_argument("--page", type=int, default=16)
    parser.add_argument("--layout", choices=("token_major", "head_major"), default="token_major")
    parser.add_argument(
        "--lengths", type=lambda s: [int(n) for n in s.split(",")], help="not the default ones"
    )
    parser.add_argument("--variants", action="store_true", help="prefill: bf16 and other head_dims, too")
    parser.add_argument("--sweep", action="store_true", help="decode: the context lengths of the plot, too")
    parser.add_argument("--backends", type=lambda s: s.split(","), default=["cuda", "cuda-sm80", "triton"])
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="TQ4 only")
    parser.add_argument("--no-flashinfer", dest="flashinfer", action="store_false", help="it compiles first")
    parser.add_argument("--no-turboquant", dest="turboquant", action="store_false", help="it is slow")
    parser.add_argument("--warmup", type=int, default=20, metavar="MS")
    parser.add_argument("--rep", type=int, default=60, metavar="MS")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the script")
    parser.add_argument("--results", type=Path, default=None, help="where records go [benchmarks/results]")
    parser.add_argument("--no-record", dest="record", action="store_false")
    args = parser.parse_args(argv)
    args.heads = args.heads or [(32, 8)]
    if args.device == "cpu":
        args.backends = ["reference"]
        if args.record and args.results is None:
            parser.error("--device cpu needs --results or --no-record: its times are no benchmark")
    elif not torch.cuda.is_available():
        parser.error("no CUDA device (--device cpu tries the script)")
    unknown = set(args.backends) - set(tq4.available_backends())
    if unknown:
        parser.error(f"unknown backends: {', '.join(sorted(unknown))}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.record:
        record.check_package_matches_tree()
    env = record.environment(args.device)
    print(f"{env['gpu']}, driver {env['driver']}, torch {env['torch']}, triton {env['triton']}", flush=True)
    session = Session(args)
    for op in OPS if args.op == "all" else (args.op,):
        run(session, op)
        if op in session.wrong:
            print(f"{op}: wrong results, nothing recorded", flush=True)
        elif args.record and session.rows.get(op):
            path = record.write(op, session.rows[op], env, args.results or record.RESULTS)
            print(f"{op}: recorded in {path}", flush=True)
    print_table(session)
    return 1 if session.wrong or session.failed else 0


if __name__ == "__main__":
    sys.exit(main())
