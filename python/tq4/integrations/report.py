"""The results of ``tq4 eval``: tables, a plot, and the record."""

from __future__ import annotations

import datetime
import importlib.util
import json
import platform
import re
import subprocess
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import tq4

if TYPE_CHECKING:
    from .agreement import Agreement
    from .evaluate import Result, Variant


def show(result: Result, console: Console | None = None) -> None:
    """Print one table."""
    settings, dense = result.settings, result.variants[0]
    table = Table(
        title=f"{Path(settings.model).name}: {result.scored} tokens in windows of {settings.window}, chunks "
        f"of {settings.chunk}; {result.environment['gpu']}, {settings.dtype}",
        title_justify="left",
    )
    heads = ["cache", f"nats/{result.unit}", "vs dense", "agreement", "cache", "prefill", "decode"]
    heads += ["greedy same", "until"] if settings.generate else []
    for head in heads:
        table.add_column(head, justify="left" if head == "cache" and not table.columns else "right")
    for variant in result.variants:
        cells = [
            variant.name,
            f"{variant.nats:.4f}",
            "" if variant is dense else str(variant.vs_dense),
            "" if variant is dense else f"{variant.agreement:.4f}",
            f"{variant.cache_bytes / 2**20:.1f} MiB, {dense.cache_bytes / variant.cache_bytes:.2f}x",
            f"{variant.prefill_us:.2f} us/token",
            f"{variant.decode_ms:.2f} ms/token",
        ]
        if settings.generate:
            none = variant is dense or variant.greedy_same is None
            cells += ["", ""] if none else [f"{variant.greedy_same:.3f}", f"{variant.greedy_prefix:.0f}"]
        table.add_row(*cells)
    console = console or Console()
    console.print(table)
    lines = [
        "vs dense: of nats, with the standard error of the paired differences. agreement: of next-token "
        "argmaxes, given the same text.",
    ]
    if settings.generate:
        lines.append(
            "greedy same, until: equal tokens, and tokens until the first difference, of "
            f"{settings.generate} generated from {settings.prompts} prompts."
        )
    scores = result.scores
    whole = "" if scores.window_error is None else f" (by windows ± {100 * scores.window_error:.3f})"
    lines.append(
        f"INT8 against fp16 scores: nats {scores.change}{whole}, agreement {scores.agreement:.4f}, on "
        f"{scores.tokens} tokens"
    )
    for variant in result.variants:
        if variant.backend is not None:
            lines.append(
                f"{variant.name}, through the model: agrees with TQ4 on {variant.agreement_with_tq4:.4f}, "
                f"nats {variant.vs_tq4}"
            )
    for line in lines:
        console.print(line, highlight=False)
    if result.backends is not None:
        console.print(_backends_table(result.backends))
    for package in result.missing:
        console.print(f"{package} is not installed: its 4-bit cache is not compared", highlight=False)


def _backends_table(compared: Agreement) -> Table:
    """Agreement of each pair of backends on own caches and on one cache."""
    first = compared.backends[0]
    table = Table(
        title=f"backends: argmaxes, decoding {compared.tokens} tokens of the dense cache's greedy text",
        title_justify="left",
        caption="own caches: each backend stores and reads its own, differences pile up through layers and "
        f"tokens. one cache: {first} stores, and at each token every backend makes the same step over those "
        f"bytes. attention: error of a layer's output on that cache, relative to {first}; mean, worst layer.",
        caption_justify="left",
    )
    for head in ("pair", "own caches", "one cache", "attention"):
        table.add_column(head, justify="left" if head == "pair" else "right")
    for pair, share in compared.own_caches.items():
        errors = compared.attention_error.get(pair.removeprefix(f"{first}, "), [])
        table.add_row(
            pair,
            f"{share:.4f}",
            f"{compared.one_cache[pair]:.4f}" if pair in compared.one_cache else "-",
            f"{sum(errors) / len(errors):.1e}, {max(errors):.1e}" if errors else "",
        )
    return table


def plot(result: Result, path: Path) -> None:
    """Loss relative to the dense cache by position in the window.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dense = result.variants[0]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    step = result.settings.window / len(dense.by_position)
    for variant in result.variants[1:]:
        change = [100 * (a / b - 1) for a, b in zip(variant.by_position, dense.by_position, strict=True)]
        axes.plot(
            [step * (i + 0.5) for i in range(len(change))], change, marker="o", ms=3, label=variant.name
        )
    axes.axhline(0.0, color="black", lw=0.8)
    axes.set_xlabel("position in the window, tokens")
    axes.set_ylabel(f"nats/{result.unit} relative to the dense cache, %")
    axes.set_title(f"{Path(result.settings.model).name}, {result.environment['gpu']}")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write(result: Result, path: Path) -> Path:
    """Write the record, in the form of the benchmark records; a folder gets ``<gpu>-transformers.json``.

    A row's ``ms`` and ``gbps`` are those of decoding one token, all layers: gbps counts the cache's bytes.
    """
    if path.is_dir():
        path = path / f"{_slug(result.environment['gpu'])}-transformers.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = asdict(result.settings) | {"model": Path(result.settings.model).name}
    settings["text"] = [Path(name).name for name in result.settings.text]
    scores = result.scores
    head = result.environment | {"settings": settings, "unit": result.unit, "scored": result.scored}
    head["int8_vs_fp16"] = {
        "tokens": scores.tokens,
        "relative": scores.change.relative,
        "error": scores.change.error,
        "window_error": scores.window_error,
        "agreement": scores.agreement,
    }
    head["seconds"] = {phase: round(seconds, 1) for phase, seconds in result.seconds.items()}
    head["backends"] = None if result.backends is None else asdict(result.backends)
    rows = [json.dumps(_row(result, variant)) for variant in result.variants]
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    path.write_text("{\n" + ",\n".join(lines) + ',\n "rows": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n")
    return path


def _row(result: Result, variant: Variant) -> dict[str, Any]:
    settings = result.settings
    row = {
        "op": "transformers",
        "impl": variant.name,
        **result.shape,
        "dtype": settings.dtype,
        "batch": 1,
        "q_len": 1,
        "kv_len": settings.window,
        "page": settings.page,
        "ms": variant.decode_ms,
        "gbps": variant.cache_bytes / variant.decode_ms / 1e6,
    }
    for name in ("vs_dense", "vs_tq4"):
        change = getattr(variant, name)
        row[name] = None if change is None else change.relative
        row[f"{name}_error"] = None if change is None else change.error
    names = "nats agreement agreement_with_tq4 cache_bytes prefill_us greedy_same greedy_prefix by_position"
    return row | {name: getattr(variant, name) for name in names.split()}


def environment(device: str) -> dict[str, Any]:
    """GPU (or the CPU), driver, versions, date, and the hash of the sources where this is a checkout."""
    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "driver": _driver() if device == "cuda" else "none",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "source_hash": _source_hash(),
    }


def _source_hash() -> str:
    script = Path(tq4.__file__).resolve().parents[2] / "benchmarks" / "record.py"
    if not script.is_file():
        return f"tq4 {_version('tq4')}, installed"
    spec = importlib.util.spec_from_file_location("_tq4_record", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.source_hash()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()[
            0
        ]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _slug(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().replace("nvidia", "")).strip("-") or "gpu"
