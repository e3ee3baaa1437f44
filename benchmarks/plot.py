"""Draw the records: docs/decode.svg (time against context) and docs/prefill.svg (TFLOPS against length).

python benchmarks/plot.py [--gpu h200] [--out docs] [--format svg|png]

The limits drawn were measured on one H200 with random data: 4530 GB/s of HBM reads, and for INT8 QK with
fp16 PV 860 TFLOPS by mma.sync and 1135 by wgmma.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import record
from table import name_of, shape_of

HBM_GBPS = 4530
CEILINGS_TFLOPS = {"ceiling, mma.sync": 860, "ceiling, wgmma": 1135}
# Colour-blind safe (Okabe and Ito); ours solid, peers dashed.
COLOURS = {
    "tq4-cuda": "#0072B2",
    "tq4-cuda-sm80": "#56B4E9",
    "tq4-triton": "#009E73",
    "tq4-reference": "#999999",
    "sdpa-cudnn": "#000000",
    "sdpa-fa2": "#E69F00",
    "flashinfer-fa3": "#D55E00",
    "flashinfer-fa2": "#CC79A7",
    "flashinfer-16bit": "#D55E00",
    "flashinfer-fp8": "#CC79A7",
    "turboquant-vllm": "#8C564B",
}


def _lines(rows: list[dict[str, Any]], value: str) -> dict[str, list[tuple[int, float]]]:
    """Points (kv_len, value) of each implementation, in order of length."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in sorted(rows, key=lambda r: r["kv_len"]):
        lines.setdefault(row["impl"], []).append((row["kv_len"], row[value]))
    return lines


def _draw(axes: Any, rows: list[dict[str, Any]], value: str) -> None:
    for impl, points in _lines(rows, value).items():
        ours = impl.startswith("tq4-")
        axes.plot(
            *zip(*points, strict=True),
            label=name_of(impl).replace("*", ""),
            color=COLOURS.get(impl, "#666666"),
            linestyle="-" if ours else "--",
            linewidth=2 if ours else 1.3,
            marker="o",
            markersize=4,
        )
    lengths = sorted({r["kv_len"] for r in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n >> 10}K" if n >= 1024 else str(n) for n in lengths], minor=False)
    axes.set_xlabel("context length (tokens)")
    axes.grid(True, which="major", alpha=0.3)


def _first_shape(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that share the first row's heads, head_dim, dtype and page."""
    keys = ("hq", "hkv", "d", "dtype", "page")
    return [r for r in rows if all(r[k] == rows[0][k] for k in keys)]


def plot_decode(data: dict[str, Any]) -> Any:
    """Time against context length, a panel for each batch with two lengths or more, and the byte limit."""
    rows = [r for r in _first_shape(data["rows"]) if r["q_len"] == 1 and "kv_tokens" not in r]
    lengths_of: dict[int, set[int]] = {}
    for row in rows:
        lengths_of.setdefault(row["batch"], set()).add(row["kv_len"])
    batches = sorted(b for b, lengths in lengths_of.items() if len(lengths) > 1)
    if not batches:
        raise ValueError("the decode record has no batch with two context lengths: bench.py decode --sweep")
    figure, panels = plt.subplots(1, len(batches), figsize=(5.2 * len(batches), 4.4), squeeze=False)
    for axes, batch in zip(panels[0], batches, strict=True):
        mine = [r for r in rows if r["batch"] == batch]
        _draw(axes, mine, "ms")
        lengths = sorted(lengths_of[batch])
        limit = [batch * n * mine[0]["hkv"] * (mine[0]["d"] + 8) / HBM_GBPS / 1e6 for n in lengths]
        axes.plot(lengths, limit, color="#444444", linestyle=":", label=f"TQ4 bytes at {HBM_GBPS} GB/s")
        axes.set_yscale("log")
        axes.set_title(f"batch {batch}")
        axes.set_ylabel("time of one decode (ms)")
    return _finish(figure, panels, data, mine[0])


def plot_prefill(data: dict[str, Any]) -> Any:
    """TFLOPS against length, with the tensor cores' ceilings."""
    rows = _first_shape(data["rows"])
    figure, panels = plt.subplots(1, 1, figsize=(7.2, 4.8), squeeze=False)
    axes = panels[0][0]
    _draw(axes, rows, "tflops")
    for (label, rate), style in zip(CEILINGS_TFLOPS.items(), (":", "-."), strict=True):
        axes.axhline(rate, color="#444444", linestyle=style, linewidth=1, label=f"{label} ({rate})")
    axes.set_ylim(bottom=0)
    axes.set_title("causal prefill, queries = keys")
    axes.set_ylabel("TFLOPS")
    return _finish(figure, panels, data, rows[0])


def _finish(figure: Any, panels: Any, data: dict[str, Any], row: dict[str, Any]) -> Any:
    handles = {}
    for axes in panels[0]:
        handles.update(dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)))
    where = dict(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.legend(handles.values(), handles.keys(), **where)
    figure.suptitle(f"{data['gpu']}: {shape_of(row)}", fontsize=10)
    return figure


def main(argv: list[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--gpu", help="as in the records' file names, where there are several")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--out", type=Path, default=record.ROOT / "docs")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    args = parser.parse_args(argv)
    plt.rcParams["figure.constrained_layout.use"] = True
    plt.rcParams["svg.hashsalt"] = "tq4"  # the same record draws the same file
    drawn = 0
    for op, draw in (("decode", plot_decode), ("prefill", plot_prefill)):
        path = record.find(op, args.gpu, args.results)
        if path is None:
            print(f"{op}: no record in {args.results}")
            continue
        args.out.mkdir(parents=True, exist_ok=True)
        target = args.out / f"{op}.{args.format}"
        metadata = {"Date": None} if args.format == "svg" else None
        draw(record.load(path)).savefig(target, dpi=140, metadata=metadata)
        print(f"{op}: {target}")
        drawn += 1
    return 0 if drawn else 1


if __name__ == "__main__":
    sys.exit(main())
