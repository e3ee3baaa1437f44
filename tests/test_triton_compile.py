"""The machine code of the Triton kernels, compiled for GPUs that are not here.

What only shows in compiled code: a kernel that the interpreter accepts and the compiler does not, products
that miss the tensor cores, spilled registers, shared memory that does not fit, and recompilation by value.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("triton_sass.py")
#: Kernel -> (what its products must be, bytes of stack that are known, their reloads a turn of the loop).
EXPECTED = {
    "90:prefill": ({"IGMMA", "HGMMA"}, 0, 0),
    "90:split": ({"HMMA"}, 40, 3),  # of 1,376 instructions; faster than any that has none
    "90:combine": ({"HMMA"}, 0, 0),
    "90:store": ({"HGMMA"}, 0, 0),
    "80:queries": ({"HMMA"}, 0, 0),
    "80:prefill": ({"IMMA", "HMMA"}, 0, 0),
    "80:split": ({"HMMA"}, 0, 0),
    "80:gather": ({"HMMA"}, 0, 0),
}
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}


def _run(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in _run("--json", *EXPECTED).splitlines()]
    return {f"{row['architecture']}:{row['kernel']}": row for row in rows}


@pytest.mark.parametrize("name", EXPECTED)
def test_products_run_on_tensor_cores(reports, name):
    products, _, _ = EXPECTED[name]
    assert set(reports[name]["products"]) == products


@pytest.mark.parametrize("name", EXPECTED)
def test_resources_fit(reports, name):
    row = reports[name]
    _, known_spills, known_reloads = EXPECTED[name]
    assert row["stack_bytes"] <= known_spills
    assert row["loop_histogram"].get("STL", 0) == 0
    assert row["loop_histogram"].get("LDL", 0) <= known_reloads
    assert row["shared_bytes"] <= SHARED_BYTES[row["architecture"]]
    assert row["registers"] * row["threads"] <= 65536


def test_programs_per_sm_fit_the_registers(reports):
    from tq4.triton_kernels.configs import decode_config

    for architecture in (80, 90):
        row = reports[f"{architecture}:split"]
        config = decode_config(divmod(architecture, 10), 128, 4)
        allocated = -(-row["registers"] // 8) * 8 * row["threads"]
        assert config.programs_per_sm * allocated <= 65536


@pytest.mark.parametrize("name", ["90:prefill", "80:prefill", "90:split", "80:split"])
def test_nibbles_are_expanded_by_byte_permutes(reports, name):
    """At least the 13 (8-bit) or 16 (fp16) permutes a word, and no table lookup in memory per element."""
    row = reports[name]
    histogram = row["loop_histogram"]
    assert histogram["PRMT"] >= 48
    assert histogram["LDG"] <= 40
    # The loops are what the design notes count; a compiler that does much worse should be noticed.
    # 90:split has two warps, where 80:split has four.
    limit = {"90:prefill": 960, "80:prefill": 620, "90:split": 1400, "80:split": 800}[name]
    assert row["loop"] <= limit


def test_shapes_do_not_recompile():
    """Batch, lengths, table width and grid are ordinary arguments: no value of theirs makes new code."""
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import triton_sass as t
decodes = [
    [t.specialization(launch, 90) for launch in t.decode(90, batch=b, table_width=w)]
    for b, w in ((1, 1), (2, 7), (16, 16), (17, 100), (64, 8192))
]
assert all(d == decodes[0] for d in decodes), decodes
prefills = [
    [t.specialization(launch, 90) for launch in t.prefill(90, batch=b, query_len=n, table_width=w)]
    for b, n, w in ((1, 33, 1), (2, 1000, 7), (16, 256, 16), (1, 4097, 300))
]
assert all(p == prefills[0] for p in prefills), prefills
stores = [[t.specialization(launch, 90) for launch in t.store(90, tokens=n)] for n in (1, 16, 17, 1000)]
assert all(s == stores[0] for s in stores), stores
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, str(SCRIPT.parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
