"""Compile the Triton backend's launches for a GPU that is not here, and read what came out.

Triton compiles to machine code without a GPU; its package carries cuobjdump and nvdisasm.  The arguments of a
launch go through Triton's own specialisation (a stand-in driver answers for the device), so what is compiled
is what a real launch would run.

    python tests/triton_sass.py [--json] [ARCHITECTURE:KERNEL ...]

prints registers, spills and instruction counts of each kernel, such as ``90:prefill`` (all of sm_80 and sm_90
without arguments).  It has to be a process of its own: with TRITON_INTERPRET set, as in the test suite,
there is nothing to compile.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

try:
    import tq4
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))
    import tq4
from tq4.backends import triton as backend
from tq4.backends.arguments import Attention

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _NoGpu:
    """As much of a Triton driver as compiling needs.  The device number is the architecture."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


@dataclass
class Compiled:
    """Machine code of one kernel and its resources."""

    name: str
    registers: int
    stack_bytes: int  # spilled registers (and nothing else, in these kernels)
    shared_bytes: int
    sass: list[str]  # instructions without predicates' operands, in order
    asm: dict[str, Any]

    def loops(self, minimum: int = 40) -> list[list[str]]:
        """Bodies of the innermost backward branches with at least ``minimum`` instructions."""
        labels: dict[str, int] = {}
        lines: list[str] = []
        spans = []
        for text in self.sass:
            if text.endswith(":"):
                labels[text[:-1]] = len(lines)
                continue
            lines.append(text)
        for i, text in enumerate(lines):
            target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", text)
            if target and labels.get(target.group(1), i) < i:
                spans.append((labels[target.group(1)], i + 1))
        inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
        return [lines[a:b] for a, b in inner if b - a >= minimum]

    def count(self, pattern: str) -> int:
        """Number of instructions whose opcode starts with ``pattern``."""
        return sum(1 for text in self.sass if opcode(text).startswith(pattern))


def opcode(instruction: str) -> str:
    """The opcode with its modifiers, without a predicate."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split(" ")[0]


def histogram(instructions: list[str]) -> dict[str, int]:
    """Counts by base opcode."""
    counts = collections.Counter(opcode(text).split(".")[0] for text in instructions)
    return dict(counts.most_common())


def compile_launch(launch: Any, architecture: int) -> Compiled:
    """Compile a :class:`tq4.backends.triton.Launch` for ``sm_<architecture>``."""
    previous = driver._active
    driver.set_active(_NoGpu(architecture))
    try:
        kernel = launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)
    finally:
        driver._active = previous
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        text = subprocess.check_output([TOOLS / "nvdisasm", "-c", path], text=True)
        usage = subprocess.check_output([TOOLS / "cuobjdump", "-res-usage", path], text=True)
    sass = []
    for line in text.splitlines():
        label = re.match(r"\s*(\.L_x_\d+:)", line)
        code = re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line)
        if label:
            sass.append(label.group(1))
        elif code:
            sass.append(re.sub(r"\s+", " ", code.group(1)))
    return Compiled(
        name=kernel.metadata.name,
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        stack_bytes=int(re.search(r"STACK:(\d+)", usage).group(1)),
        shared_bytes=kernel.metadata.shared,
        sass=sass,
        asm=dict(kernel.asm),
    )


# ---- The launches worth looking at: Llama-3.1-8B's shape, and the largest head.


def attention_arguments(
    batch: int = 4,
    query_len: int = 64,
    *,
    head_dim: int = 128,
    heads: tuple[int, int] = (32, 8),
    page: int = 16,
    table_width: int = 8,
    dtype: torch.dtype = torch.float16,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Attention:
    """Arguments of an attention op (uninitialised tensors: only their types and addresses matter)."""
    num_q_heads, num_kv_heads = heads
    quantizer = tq4.Quantizer(head_dim)
    cache = tq4.PagedCache(2, num_kv_heads, head_dim, block_size=page)
    q = torch.empty(batch * query_len, num_q_heads, head_dim, dtype=dtype)
    return Attention.of(
        q,
        cache.tensor,
        torch.empty(batch, table_width, dtype=torch.int32),
        torch.empty(batch, dtype=torch.int32),
        torch.empty(batch + 1, dtype=torch.int32),
        quantizer,
        num_kv_heads,
        causal=window == (-1, -1),
        window_left=window[0],
        window_right=window[1],
        softcap=softcap,
        max_query_len=query_len,
    )


def _hardware(architecture: int) -> backend.Hardware:
    return backend.Hardware(divmod(architecture, 10), num_sms=132, ptx=True)


def prefill(architecture: int, *, int8: bool = True, **shape: Any) -> list[Any]:
    """Launches of a prefill: queries, prefill."""
    return backend.prefill_launches(replace(attention_arguments(**shape), int8=int8), _hardware(architecture))


def decode(architecture: int, **shape: Any) -> list[Any]:
    """Launches of a decode: prepare, split, combine."""
    arguments = attention_arguments(**({"query_len": 1} | shape))
    if arguments.max_query_len == 1:
        arguments.query_start_loc = None
    return backend.decode_launches(arguments, _hardware(architecture))


def store(architecture: int, tokens: int = 4096, *, head_dim: int = 128, **kind: Any) -> list[Any]:
    """The launch of a store."""
    quantizer = tq4.Quantizer(head_dim)
    x = torch.empty(tokens, 8, head_dim, dtype=kind.get("dtype", torch.float16))
    return backend.store_launches(
        x,
        x,
        tq4.PagedCache(2, 8, head_dim).tensor,
        torch.empty(tokens, dtype=torch.int64),
        quantizer.k_rotation,
        quantizer.v_rotation,
        quantizer.k_centroids,
        quantizer.k_boundaries,
        quantizer.v_centroids,
        quantizer.v_boundaries,
        False,
        divmod(architecture, 10),
    )


def gather(architecture: int, tokens: int = 4096, *, head_dim: int = 128) -> list[Any]:
    """The launch of a gather."""
    quantizer = tq4.Quantizer(head_dim)
    x = torch.empty(tokens, 8, head_dim, dtype=torch.float16)
    return backend.gather_launches(
        tq4.PagedCache(2, 8, head_dim).tensor,
        torch.empty(1, 8, dtype=torch.int32),
        torch.empty(1, dtype=torch.int32),
        torch.empty(2, dtype=torch.int32),
        quantizer.k_rotation,
        quantizer.v_rotation,
        quantizer.k_centroids,
        quantizer.v_centroids,
        x,
        x,
        divmod(architecture, 10),
    )


#: Kernel name on the command line -> its launch for an architecture.
KERNELS = {
    "queries": lambda a: prefill(a)[0],
    "prefill": lambda a: prefill(a)[1],
    "prefill-fp16": lambda a: prefill(a, int8=False)[1],
    "prefill-window": lambda a: prefill(a, window=(100, 0), softcap=20.0)[1],
    "prefill-256": lambda a: prefill(a, head_dim=256, heads=(16, 2))[1],
    "prepare": lambda a: decode(a)[0],
    "split": lambda a: decode(a)[1],
    "split-64": lambda a: decode(a, query_len=16)[1],
    "split-256": lambda a: decode(a, head_dim=256, heads=(16, 2))[1],
    "combine": lambda a: decode(a)[2],
    "store": lambda a: store(a)[0],
    "store-fp32": lambda a: store(a, dtype=torch.float32)[0],
    "gather": lambda a: gather(a)[0],
}


def specialization(launch: Any, architecture: int) -> str:
    """What a launch's code depends on: launches with equal text share one compilation."""
    previous = driver._active
    driver.set_active(_NoGpu(architecture))
    try:
        binder = launch.kernel.device_caches[architecture][-1]
        _, types, _ = binder(**launch.arguments, **launch.options)
    finally:
        driver._active = previous
    constants = {k: v for k, v in launch.arguments.items() if k.isupper()}
    return repr((types, constants, launch.options))


def report(architecture: int, name: str) -> dict[str, Any]:
    """Compile one of KERNELS: its resources, and the instructions of its longest loop."""
    launch = KERNELS[name](architecture)
    compiled = compile_launch(launch, architecture)
    loop = max(compiled.loops(), key=len, default=[])
    products = ("IGMMA", "HGMMA", "IMMA", "HMMA", "UTCHMMA", "UTCIMMA")
    return {
        "architecture": architecture,
        "kernel": name,
        "registers": compiled.registers,
        "stack_bytes": compiled.stack_bytes,
        "shared_bytes": compiled.shared_bytes,
        "threads": 32 * launch.options["num_warps"],
        "products": {p: n for p in products if (n := compiled.count(p))},
        "prmt": compiled.count("PRMT"),
        "local": compiled.count("LDL") + compiled.count("STL"),
        "loop": len(loop),
        "loop_histogram": histogram(loop),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="ARCHITECTURE:KERNEL", help=f"of {', '.join(KERNELS)}")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    wanted = [k.split(":") for k in arguments.kernels] or [(a, k) for a in (80, 90) for k in KERNELS]
    for architecture, name in wanted:
        row = report(int(architecture), name)
        if arguments.json:
            print(json.dumps(row), flush=True)
            continue
        text = "registers {registers:3d}  stack {stack_bytes:4d}  shared {shared_bytes:6d}  loop {loop:5d}"
        print(f"sm_{architecture} {name:15s} {text.format(**row)}  {row['products']}", flush=True)


if __name__ == "__main__":
    main()
