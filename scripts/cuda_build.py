"""What setup.py knows about CUDA: where the toolkit is, which architectures, which flags.

Standard library only, so that it can be imported and tested without torch.  CMakeLists.txt reads the
same sources.json and resolves architectures by the same rules (cmake/Tq4Archs.cmake);
tests/test_packaging.py holds the two against each other.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class BuildError(RuntimeError):
    """The CUDA extension was asked for and cannot be built."""


# ---------------------------------------------------------------------------------------------
# The toolkit


@dataclass(frozen=True)
class Toolkit:
    """One CUDA toolkit: `home`/bin/nvcc, its version, headers and the static runtime."""

    home: Path
    version: tuple[int, int, int]
    include_dirs: tuple[Path, ...]
    cudart_static: Path
    gpu_codes: tuple[str, ...]  # what this nvcc can generate: ("sm_80", ...)

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"

    @property
    def version_string(self) -> str:
        return ".".join(map(str, self.version))


def _output(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return done.stdout


def _nvcc_candidates() -> list[str]:
    found = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            found.append(str(Path(os.environ[variable]) / "bin" / "nvcc"))
    if os.environ.get("CUDACXX"):
        found.append(os.environ["CUDACXX"])
    if shutil.which("nvcc"):
        found.append(shutil.which("nvcc"))
    found.append("/usr/local/cuda/bin/nvcc")
    return [c for c in found if os.access(c, os.X_OK)]


def find_toolkit() -> tuple[Toolkit | None, str]:
    """The CUDA toolkit to build with, or None and the reason.

    Looked for in CUDA_HOME, CUDA_PATH, CUDACXX, PATH and /usr/local/cuda, in this order.  The toolkit's
    root is what nvcc itself reports (`nvcc -dryrun` prints TOP): the nvcc on PATH may be a wrapper script
    or a link far from its toolkit.
    """
    candidates = _nvcc_candidates()
    if not candidates:
        return None, "nvcc was not found (CUDA_HOME, CUDACXX, PATH, /usr/local/cuda)"
    nvcc = candidates[0]
    try:
        dryrun = _output(nvcc, "-dryrun", "-x", "cu", "-c", os.devnull)
        version = re.search(r"release \d+\.\d+, V(\d+)\.(\d+)\.(\d+)", _output(nvcc, "--version"))
        codes = tuple(re.findall(r"sm_\d+", _output(nvcc, "--list-gpu-code")))
    except (OSError, subprocess.CalledProcessError) as error:
        return None, f"{nvcc} does not run: {error}"
    top = re.search(r"^#\$ TOP=(.*)$", dryrun, re.MULTILINE)
    if top is None or version is None:
        return None, f"{nvcc} does not say where its toolkit is or which version it has"
    home = Path(top.group(1)).resolve()
    number = (int(version[1]), int(version[2]), int(version[3]))
    minimum = tuple(map(int, load_sources()["min_nvcc"].split(".")))
    if number[:2] < minimum:
        return None, f"{nvcc} is CUDA {number[0]}.{number[1]}, needed is {minimum[0]}.{minimum[1]} or later"
    targets = sorted(home.glob("targets/*-linux"))
    headers = [d / "include" for d in (home, *targets)]
    include_dirs = tuple(d for d in headers if (d / "cuda_runtime.h").exists())
    if not include_dirs:
        return None, f"cuda_runtime.h is not under {home}: the CUDA runtime headers are not installed"
    libraries = [d / lib for d in (home, *targets) for lib in ("lib64", "lib")]
    cudart = next((d / "libcudart_static.a" for d in libraries if (d / "libcudart_static.a").exists()), None)
    if cudart is None:
        return None, f"libcudart_static.a is not under {home}: the CUDA runtime library is not installed"
    return Toolkit(home, number, include_dirs[:1], cudart, codes), ""


# ---------------------------------------------------------------------------------------------
# sources.json


def load_sources() -> dict:
    """sources.json: the one list of source files, architecture groups and default architectures."""
    return json.loads((ROOT / "sources.json").read_text())


# ---------------------------------------------------------------------------------------------
# Architectures


@dataclass(frozen=True)
class ArchPlan:
    """What each group of kernels is compiled for.  Versions are strings, "8.0"."""

    portable: tuple[str, ...]  # real architectures of the portable kernels
    ptx: str | None  # and PTX of this one
    sm90a: bool  # whether the sm_90a-only kernels are built

    def names(self) -> list[str]:
        """Everything there is code for, such as ["8.0", "9.0", "9.0a", "12.0", "12.0+PTX"]."""
        names = []
        for arch in self.portable:
            names.append(arch)
            if arch == "9.0" and self.sm90a:
                names.append("9.0a")
            if arch == self.ptx:
                names.append(arch + "+PTX")
        return names

    def gencode(self, group: str) -> list[str]:
        """nvcc flags of one group of sources.json: "portable" or "sm90a"."""
        if group == "sm90a":
            return ["-gencode=arch=compute_90a,code=sm_90a"] if self.sm90a else []
        flags = []
        for arch in self.portable:
            number = arch.replace(".", "")
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if self.ptx:
            number = self.ptx.replace(".", "")
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags


_NAMED = {
    "Ampere": ["8.0", "8.6+PTX"],
    "Ada": ["8.9+PTX"],
    "Hopper": ["9.0+PTX"],
    "Blackwell": ["10.0", "12.0+PTX"],
}


def _order(arch: str) -> tuple[int, ...]:
    return tuple(map(int, arch.split(".")))


def plan_archs(requested: str, gpu_codes: tuple[str, ...]) -> ArchPlan:
    """Resolve a TORCH_CUDA_ARCH_LIST ("8.0;9.0a", "8.6 9.0+PTX", "Hopper") against what nvcc can generate.

    The portable kernels get the plain architectures; 9.0 and 9.0a both also ask for the sm_90a kernels,
    because an sm_90a binary runs on exactly that chip and everything with compute capability 9.0 is one.
    Raises BuildError for architectures that are malformed, older than 8.0 or unknown to nvcc.
    """
    entries: list[str] = []
    for word in re.split(r"[\s;,]+", requested.strip()):
        entries.extend(_NAMED.get(word.capitalize(), [word] if word else []))
    portable, ptx, sm90a = set(), set(), False
    for entry in entries:
        match = re.fullmatch(r"(\d+\.\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: expected the like of 8.0, 9.0a or 9.0+PTX, got {entry!r}"
            )
        arch = match.group(1)
        if _order(arch) < (8, 0):
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: the kernels need 8.0 or later, got {entry!r}")
        if "sm_" + arch.replace(".", "") not in gpu_codes:
            known = ", ".join(gpu_codes)
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: this nvcc generates {known} only, got {entry!r}")
        portable.add(arch)
        if match.group(3):
            ptx.add(arch)
        sm90a = sm90a or arch == "9.0"
    if not portable:
        raise BuildError("TORCH_CUDA_ARCH_LIST names no architecture")
    return ArchPlan(tuple(sorted(portable, key=_order)), max(ptx, key=_order) if ptx else None, sm90a)


def visible_archs() -> list[str]:
    """Compute capabilities of the GPUs of this machine as nvidia-smi reports them; [] without any."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        text = _output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    except (OSError, subprocess.CalledProcessError):
        return []
    return sorted(set(re.findall(r"^\s*(\d+\.\d+)\s*$", text, re.MULTILINE)), key=_order)


def default_archs(gpu_codes: tuple[str, ...], visible: list[str]) -> str:
    """The architecture list when TORCH_CUDA_ARCH_LIST is not set.

    The visible GPUs' architectures; one that this nvcc does not know yet gets PTX of the newest older
    one.  Without a GPU, sources.json's list as far as nvcc supports it, plus PTX of the last.
    """
    known = sorted({f"{code[3:-1]}.{code[-1]}" for code in gpu_codes}, key=_order)
    wanted = [arch for arch in visible if _order(arch) >= (8, 0)]
    if wanted:
        chosen = []
        for arch in wanted:
            older = [k for k in known if _order(k) <= _order(arch)]
            chosen.append(arch if arch in known else older[-1] + "+PTX")
        return " ".join(chosen)
    plain = [arch for arch in load_sources()["default_archs"] if arch.rstrip("a") in known]
    return " ".join(plain) + "+PTX" if plain[-1][-1].isdigit() else " ".join(plain)


def current_plan(toolkit: Toolkit) -> ArchPlan:
    """The plan for this machine and environment."""
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if not requested or requested == "native":
        requested = default_archs(toolkit.gpu_codes, visible_archs())
    return plan_archs(requested, toolkit.gpu_codes)


# ---------------------------------------------------------------------------------------------
# Flags


def nvcc_flags(entry: dict, plan: ArchPlan) -> list[str]:
    """nvcc flags of one entry of sources.json's kernels."""
    flags = list(load_sources()["nvcc_flags"])
    if not entry.get("allow_local_memory", False):
        # A spill or a local array is a build failure, not a surprise in a profile.
        strict = os.environ.get("TQ4_ALLOW_SPILLS", "") != "1"
        flags.append("-Xptxas=-warn-spills,-warn-lmem-usage" + (",-Werror" if strict else ""))
    if plan.sm90a:
        flags.append("-DTQ4_HAS_SM90A")
    return flags + plan.gencode(entry["group"])


def kernel_groups(plan: ArchPlan) -> list[tuple[list[str], list[str]]]:
    """(sources, nvcc flags) for every distinct set of flags, in the order of sources.json."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for entry in load_sources()["kernels"]:
        if entry["group"] == "host" or (entry["group"] == "sm90a" and not plan.sm90a):
            continue
        groups.setdefault(tuple(nvcc_flags(entry, plan)), []).append(entry["file"])
    return [(sources, list(flags)) for flags, sources in groups.items()]


def host_sources() -> list[str]:
    """C++ files of the library itself: launchers that choose among kernels."""
    return [entry["file"] for entry in load_sources()["kernels"] if entry["group"] == "host"]


def build_info(plan: ArchPlan | None, toolkit: Toolkit | None, torch_version: str, reason: str = "") -> dict:
    """What python/tq4/_build_info.json records: the same bytes for the same inputs, no date, no path."""
    if plan is None or toolkit is None:
        return {"cuda_extension": False, "reason": reason}
    return {
        "cuda_extension": True,
        "archs": plan.names(),
        "nvcc": toolkit.version_string,
        "torch": torch_version,
    }
