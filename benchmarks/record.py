"""The benchmark record: what was measured, on what, from which sources.

One JSON file per GPU and operation, ``benchmarks/results/<gpu>-<op>.json``: an object with ``gpu``,
``driver``, ``torch``, ``triton``, ``date``, ``source_hash`` and ``rows``; each row has ``op``, ``impl``,
``hq``, ``hkv``, ``d``, ``dtype``, ``batch``, ``q_len``, ``kv_len``, ``page``, ``ms`` and ``tflops`` or
``gbps``, and may have more.  A file holds one run only, because times of different runs do not compare.

    python benchmarks/record.py            # print the source hash of this tree
    python benchmarks/record.py --stale    # name the records made from other sources; exit status 1 if any
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

ENVIRONMENT_KEYS = ("gpu", "driver", "torch", "triton", "date", "source_hash")
ROW_KEYS = ("op", "impl", "hq", "hkv", "d", "dtype", "batch", "q_len", "kv_len", "page", "ms")
RATE_KEYS = ("tflops", "gbps")

_SOURCE_TREES = ("csrc", "python/tq4")
_PRODUCT_SUFFIXES = (".so", ".o", ".pyc", ".pyd")
_PRODUCT_NAMES = ("_build_info.json",)


def source_files(root: Path = ROOT) -> list[Path]:
    """The sources that decide speed: every file of csrc/ and python/tq4/ but build products and caches."""
    files = []
    for tree in _SOURCE_TREES:
        for path in (root / tree).rglob("*"):
            hidden = any(
                part == "__pycache__" or part.startswith(".") for part in path.relative_to(root).parts
            )
            product = path.suffix in _PRODUCT_SUFFIXES or path.name in _PRODUCT_NAMES
            if path.is_file() and not hidden and not product:
                files.append(path)
    return sorted(files, key=lambda p: p.relative_to(root).as_posix())


def source_hash(root: Path = ROOT) -> str:
    """sha256 over the sources' names and contents, in the order of their names."""
    digest = hashlib.sha256()
    for path in source_files(root):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def age_note(data: dict[str, Any]) -> str:
    """What a table of this record has to say beside its date: nothing if these sources made it."""
    made_from = data["source_hash"]
    return "" if made_from == source_hash() else f", with earlier sources ({made_from[:12]}) than these"


def check_package_matches_tree(root: Path = ROOT) -> None:
    """The imported tq4 must be this tree's, else the hash would vouch for code that was not measured.

    Raises:
        RuntimeError: a Python file of the imported package differs from the tree's, or is missing.
    """
    import tq4

    package = Path(tq4.__file__).resolve().parent
    tree = root / "python" / "tq4"
    if package == tree:
        return
    for path in source_files(root):
        if path.suffix != ".py" or not path.is_relative_to(tree):
            continue
        installed = package / path.relative_to(tree)
        if not installed.is_file() or installed.read_bytes() != path.read_bytes():
            raise RuntimeError(
                f"the imported tq4 ({package}) is not this tree's: {path.relative_to(root)} differs. "
                "Install the tree again (pip install .) or put its python/ first on PYTHONPATH."
            )


def driver_version() -> str:
    """Version of the NVIDIA driver, or "unknown"."""
    try:
        out = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return out[0] if out else "unknown"


def environment(device: str = "cuda") -> dict[str, Any]:
    """The record's head: GPU (or the CPU), driver, versions, date and source hash."""
    import torch
    import triton

    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "driver": driver_version() if device == "cuda" else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "source_hash": source_hash(),
    }


def gpu_slug(gpu: str) -> str:
    """A GPU's name as part of a file name: "NVIDIA H200" is "h200"."""
    words = re.sub(r"[^a-z0-9]+", "-", gpu.lower().replace("nvidia", "")).strip("-")
    return words or "gpu"


def check_rows(rows: Iterable[dict[str, Any]]) -> None:
    """Raises ValueError for a row that lacks a key, a rate, or has a time that is not positive."""
    for row in rows:
        missing = [k for k in ROW_KEYS if k not in row]
        if missing:
            raise ValueError(f"row {row}: missing {', '.join(missing)}")
        if not any(k in row for k in RATE_KEYS):
            raise ValueError(f"row {row}: has neither {' nor '.join(RATE_KEYS)}")
        if not row["ms"] > 0:
            raise ValueError(f"row {row}: ms must be positive")


def write(op: str, rows: list[dict[str, Any]], env: dict[str, Any], directory: Path = RESULTS) -> Path:
    """Write one operation's record and return its path.

    Raises:
        ValueError: no rows, a row of another operation, or a row that breaks ``check_rows``.
    """
    if not rows:
        raise ValueError(f"{op}: no rows to record")
    check_rows(rows)
    strangers = {r["op"] for r in rows} - {op}
    if strangers:
        raise ValueError(f"rows of {sorted(strangers)} in the record of {op}")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{gpu_slug(env['gpu'])}-{op}.json"
    head = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in env.items())
    body = ",\n".join("  " + json.dumps(r) for r in rows)  # a row a line: records are read in diffs
    path.write_text(f'{{\n{head},\n "rows": [\n{body}\n ]\n}}\n')
    return path


def load(path: Path) -> dict[str, Any]:
    """Read and check one record.

    Raises:
        ValueError: a key is missing.
    """
    record = json.loads(path.read_text())
    missing = [k for k in (*ENVIRONMENT_KEYS, "rows") if k not in record]
    if missing:
        raise ValueError(f"{path}: missing {', '.join(missing)}")
    check_rows(record["rows"])
    return record


def find(op: str, gpu: str | None = None, directory: Path = RESULTS) -> Path | None:
    """The record of an operation: of ``gpu`` (a slug), or of the only or first GPU there is."""
    paths = sorted(directory.glob(f"{gpu or '*'}-{op}.json"))
    return paths[0] if paths else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stale", action="store_true", help="name the records that other sources made")
    args = parser.parse_args(argv)
    current = source_hash()
    if not args.stale:
        print(current)
        return 0
    stale = [p for p in sorted(RESULTS.glob("*.json")) if load(p)["source_hash"] != current]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: made from other sources")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
