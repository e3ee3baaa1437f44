"""Compile the Triton backend's launches for a GPU that is not here, and read what came out.

Triton compiles to machine code without a GPU; its package carries cuobjdump and nvdisasm.  The arguments of a
launch go through Triton's own specialisation (a stand-in driver answers for the device), so what is compiled
is what a real launch would run.

    python tests/triton_sass.py [sm_90 ...]     prints registers, spills and instruction counts of each kernel
"""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

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
