"""Fill README.md's tables from their records, so that no number in it is typed by hand.

    python scripts/update_readme.py            # rewrite the tables
    python scripts/update_readme.py --check    # exit status 1 where README.md says something else

Benchmark tables stand between ``<!-- benchmark:OP -->`` markers and come from benchmarks/results (see
benchmarks/table.py); the demo's table stands between ``<!-- demo -->`` markers and comes from a file of
benchmarks/demo, which ``tq4 demo --json`` writes: of a GPU if there is one, else cpu.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import record  # noqa: E402
import table  # noqa: E402
from tq4 import demo  # noqa: E402

_DEMO = re.compile(r"(<!-- demo -->\n).*?(<!-- /demo -->)", re.DOTALL)


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


def update(text: str) -> str:
    """``text`` with every table replaced by what its record says."""
    tables = table.render(record.RESULTS)
    for op in re.findall(r"<!-- benchmark:([a-z]+) -->", text):
        tables.setdefault(op, f"Not recorded yet: `python benchmarks/bench.py {op}` on a GPU records it.")
    text = table.update(text, tables)
    shown = render_demo(demo_record())
    return _DEMO.sub(lambda match: f"{match[1]}{shown}\n{match[2]}", text)


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
