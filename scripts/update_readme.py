"""Fill README.md's tables from their records, so that no number in it is typed by hand.

    python scripts/update_readme.py            # rewrite the tables
    python scripts/update_readme.py --check    # exit status 1 where README.md says something else

Benchmark tables stand between ``<!-- benchmark:OP -->`` markers and come from benchmarks/results (see
benchmarks/table.py); the demo's table stands between ``<!-- demo -->`` markers and comes from a file of
benchmarks/demo, which ``tq4 demo --json`` writes: of a GPU if there is one, else cpu.json.  What a cache
costs a model stands between ``<!-- transformers -->`` markers and comes from ``tq4 eval --json``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import record  # noqa: E402
import table  # noqa: E402
from tq4 import demo  # noqa: E402

_DEMO = re.compile(r"(<!-- demo -->\n).*?(<!-- /demo -->)", re.DOTALL)
_TRANSFORMERS = re.compile(r"(<!-- transformers -->\n).*?(<!-- /transformers -->)", re.DOTALL)


def demo_record() -> Path:
    """The demo result that README.md shows."""
    folder = ROOT / "benchmarks" / "demo"
    return next((path for path in sorted(folder.glob("*.json")) if path.stem != "cpu"), folder / "cpu.json")


def render_demo(path: Path) -> str:
    """Markdown of one demo result."""
    fields = json.loads(path.read_text())
    rows = [demo.Row(**row) for row in fields.pop("rows")]
    result = demo.Result(**fields, rows=rows)
    header = [" ".join(name.split()) for name in demo.columns()]
    lines = ["| " + " | ".join(header) + " |", "|---|---|" + "---:|" * (len(header) - 2)]
    lines += ["| " + " | ".join(cells) + " |" for cells in demo.table(result)]
    return demo.headline(result) + ":\n\n" + "\n".join(lines)


def _percent(relative: float, error: float | None, digits: int = 2) -> str:
    known = "" if error is None else f" ± {100 * error:.{digits}f}"
    return f"{100 * relative:+.{digits}f}{known} %"


def render_transformers(data: dict[str, Any]) -> str:
    """Markdown of a record of ``tq4 eval``; standard errors and backends as far as it has them."""
    rows, settings = data["rows"], data["settings"]
    dense = rows[0]
    lines = [
        f"| cache | nats/{data['unit']} | relative to dense | same next token | memory | equal generated |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        change = _percent(row["nats"] / dense["nats"] - 1, row.get("vs_dense_error"))
        same = row["greedy_same"]
        cells = (
            row["impl"],
            f"{row['nats']:.4f}",
            "" if row is dense else change,
            "" if row is dense else f"{row['agreement']:.4f}",
            f"{row['cache_bytes'] / 2**20:.1f} MiB",
            "" if row is dense or same is None else f"{same:.3f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    notes = [
        f"{data['scored']} tokens in windows of {settings['window']}, each next token given the same text; "
        f"{settings['generate']} greedy tokens from each of {settings['prompts']} prompts. {data['gpu']}, "
        f"{settings['dtype']}, torch {data['torch']}, transformers {data['transformers']}, {data['date']}"
        f"{record.age_note(data)}."
    ]
    scores = data.get("int8_vs_fp16")
    if scores:
        notes.append(
            f"INT8 relative to fp16 scores, {scores['tokens']} tokens: "
            f"{_percent(scores['relative'], scores['error'], 3)}. ±: standard error of paired differences."
        )
    parts = ["\n".join(lines), " ".join(notes)]
    if data.get("backends"):
        parts.append(_render_backends(data["backends"]))
    return "\n\n".join(parts)


def _render_backends(compared: dict[str, Any]) -> str:
    """Which share of next tokens each pair of backends agrees on."""
    lines = [
        f"| same next token, {compared['tokens']} generated tokens decoded | each backend's own cache "
        f"| one cache, stored by {compared['backends'][0]} |",
        "|---|---:|---:|",
    ]
    for pair, share in compared["own_caches"].items():
        shared = f"{compared['one_cache'][pair]:.4f}" if pair in compared["one_cache"] else "-"
        lines.append(f"| {pair} | {share:.4f} | {shared} |")
    return "\n".join(lines)


def update(text: str) -> str:
    """``text`` with every table replaced by what its record says."""
    tables = table.render(record.RESULTS)
    for op in re.findall(r"<!-- benchmark:([a-z]+) -->", text):
        tables.setdefault(op, f"Not recorded yet: `python benchmarks/bench.py {op}` on a GPU records it.")
    text = table.update(text, tables)
    shown = render_demo(demo_record())
    text = _DEMO.sub(lambda match: f"{match[1]}{shown}\n{match[2]}", text)
    path = next(iter(sorted(record.RESULTS.glob("*-transformers.json"))), None)
    if path is None:
        return text
    shown = render_transformers(json.loads(path.read_text()))
    return _TRANSFORMERS.sub(lambda match: f"{match[1]}{shown}\n{match[2]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = update(old)
    if not arguments.check:
        readme.write_text(new)
    elif new != old:
        print("README.md does not show its records: python scripts/update_readme.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
