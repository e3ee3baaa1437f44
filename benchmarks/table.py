"""Render the records as markdown tables and keep README.md in step with them.

    python benchmarks/table.py             # print the tables
    python benchmarks/table.py --write     # put them between README.md's markers
    python benchmarks/table.py --check     # exit status 1 when README.md says something else

A table of an operation stands between ``<!-- benchmark:OP -->`` and ``<!-- /benchmark:OP -->``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import record

NAMES = {
    "tq4-cuda": "**tq4, CUDA**",
    "tq4-cuda-sm80": "**tq4, CUDA, portable kernels**",
    "tq4-triton": "**tq4, Triton**",
    "tq4-cuda-exact": "tq4, CUDA, exact mode",
    "tq4-cuda-prefill": "tq4, CUDA, prefill kernels for all",
    "tq4-cuda-in-a-row": "tq4, CUDA, one of 8 in a row",
    "copy": "torch copy of as many bytes",
    "copy-in-a-row": "torch copy of as many bytes, one of 8 in a row",
    "tq4-cuda-sm80-prefill": "tq4, CUDA, portable kernels, prefill kernels for all",
    "tq4-triton-prefill": "tq4, Triton, prefill kernels for all",
    "tq4-reference": "tq4, reference",
    "sdpa-cudnn": "torch SDPA, cuDNN, dense",
    "sdpa-fa2": "torch SDPA, FlashAttention-2, dense",
    "flashinfer-fa3": "FlashInfer FA3, paged",
    "flashinfer-fa2": "FlashInfer FA2, paged",
    "flashinfer-16bit": "FlashInfer, paged, 16-bit",
    "flashinfer-fp8": "FlashInfer, paged, fp8",
    "turboquant-vllm": "turboquant-vllm, Triton TQ4",
}
RATE_OPS = ("prefill", "chunk", "varlen")  # tables of TFLOPS; the others show milliseconds
_MARKER = re.compile(r"(<!-- benchmark:(?P<op>[a-z]+) -->\n).*?(<!-- /benchmark:(?P=op) -->)", re.DOTALL)


def name_of(impl: str) -> str:
    """How an implementation is called in tables and plots."""
    return NAMES.get(impl, impl)


def _count(n: int) -> str:
    return f"{n >> 10}K" if n >= 1024 and n % 1024 == 0 else str(n)


def _column(row: dict[str, Any]) -> str:
    """The heading of a row's workload."""
    op = row["op"]
    if "kv_tokens" in row:
        return f"{row['batch']} sequences, {row['kv_tokens']} keys"
    if op == "prefill":
        return _count(row["kv_len"])
    if op == "chunk":
        return f"{_count(row['q_len'])} of {_count(row['kv_len'])}"
    if op == "store":
        return f"{_count(row['q_len'])} tokens"
    several = f", {row['q_len']} tokens" if row["q_len"] > 1 else ""
    return f"B={row['batch']} {_count(row['kv_len'])}{several}"


def shape_of(row: dict[str, Any]) -> str:
    """The heading of a table or a plot: what its rows have in common."""
    return f"{row['hq']} query / {row['hkv']} KV heads, D {row['d']}, {row['dtype']}, page {row['page']}"


def _cell(row: dict[str, Any]) -> str:
    if row["op"] in RATE_OPS:
        return f"{row['tflops']:.0f}"
    if row["op"] == "store":
        return f"{row['ms'] * 1e3:.1f} us, {row['gbps']:.0f} GB/s"
    return f"{row['ms']:.4f}"


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))


def render_record(data: dict[str, Any]) -> str:
    """Markdown of one record: a table for each combination of heads, head_dim, dtype and page."""
    rows = [r for r in data["rows"] if not r.get("sweep")]  # a sweep is for the plot
    unit = "TFLOPS" if rows[0]["op"] in RATE_OPS else "time" if rows[0]["op"] == "store" else "ms"
    parts = []
    for shape in _unique(map(shape_of, rows)):
        mine = [r for r in rows if shape_of(r) == shape]
        columns = _unique(map(_column, mine))
        cells = {(r["impl"], _column(r)): _cell(r) for r in mine}
        lines = [f"{shape} ({unit})", "", f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
        for impl in _unique(r["impl"] for r in mine):
            values = (cells.get((impl, c), "-") for c in columns)
            lines.append(f"| {name_of(impl)} | " + " | ".join(values) + " |")
        parts.append("\n".join(lines))
    versions = ", ".join(f"{name} {data[name]}" for name in ("driver", "torch", "triton"))
    return "\n\n".join([*parts, f"{data['gpu']}, {versions}, {data['date']}{record.age_note(data)}."])


def render(directory: Path = record.RESULTS, gpu: str | None = None) -> dict[str, str]:
    """Markdown of every operation that has a record, by operation."""
    tables = {}
    for path in sorted(directory.glob(f"{gpu or '*'}-*.json")):
        data = record.load(path)
        tables.setdefault(data["rows"][0]["op"], render_record(data))
    return tables


def update(text: str, tables: dict[str, str]) -> str:
    """``text`` with the tables put between its markers.

    Raises:
        ValueError: a marker names an operation without a record.
    """

    def replace(match: re.Match[str]) -> str:
        op = match["op"]
        if op not in tables:
            raise ValueError(f"README.md has a marker for {op}, which has no record")
        return f"{match[1]}{tables[op]}\n{match[3]}"

    return _MARKER.sub(replace, text)


def main(argv: list[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true")
    mode.add_argument("--check", action="store_true")
    parser.add_argument("--readme", type=Path, default=record.ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--gpu", help="as in the records' file names, where there are several")
    args = parser.parse_args(argv)
    tables = render(args.results, args.gpu)
    if not (args.write or args.check):
        print("\n\n".join(f"## {op}\n\n{table}" for op, table in tables.items()))
        return 0
    old = args.readme.read_text()
    new = update(old, tables)
    if args.write:
        args.readme.write_text(new)
    elif new != old:
        print(f"{args.readme} does not show the records: python benchmarks/table.py --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
