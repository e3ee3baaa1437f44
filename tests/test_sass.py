"""The machine code of the built extension: tensor-core instructions, no spills and no local memory.

Needs no GPU, only the extension and a cuobjdump (the CUDA toolkit has one, and so has the triton package).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import tq4

PACKAGE = Path(tq4.__file__).parent
EXTENSION = PACKAGE / "_C.so"
HEAD_DIMS = (64, 96, 128, 256)
#: Not an instruction: counts those whose descriptor begins at an odd register.
ODD_DESCRIPTOR = "odd descriptor"
#: The same of 16-byte copies to a register's address plus a constant.
CONSTANT_COPY = "copy at a constant"

pytestmark = pytest.mark.skipif(
    not EXTENSION.exists(), reason="no CUDA extension was built (no nvcc, or TQ4_BUILD_CUDA=0)"
)


def _cuobjdump() -> tuple[str, dict[str, str]]:
    """The tool, and an environment in which it finds nvdisasm beside itself."""
    places = [shutil.which("cuobjdump")]
    if os.environ.get("CUDA_HOME"):
        places.append(str(Path(os.environ["CUDA_HOME"]) / "bin" / "cuobjdump"))
    places.append("/usr/local/cuda/bin/cuobjdump")
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        places.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    for place in places:
        if place and os.access(place, os.X_OK):
            folder = str(Path(place).resolve().parent)
            return place, {**os.environ, "PATH": folder + os.pathsep + os.environ.get("PATH", "")}
    pytest.skip("no cuobjdump: neither a CUDA toolkit with it nor the triton package is installed")


def _run(*options: str) -> str:
    tool, environment = _cuobjdump()
    done = subprocess.run([tool, *options, str(EXTENSION)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def instructions() -> dict[tuple[str, str], Counter]:
    """Instruction counts by (architecture, mangled kernel name)."""
    counts: dict[tuple[str, str], Counter] = defaultdict(Counter)
    arch = name = ""
    for line in _run("-sass").splitlines():
        if match := re.match(r"\s*code for (sm_\w+)", line):
            arch = match.group(1)
        elif match := re.match(r"\s*Function : (\S+)", line):
            name = match.group(1)
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            counts[arch, name][match.group(1)] += 1
            if re.search(r"desc\[UR\d*[13579]\]", line):
                counts[arch, name][ODD_DESCRIPTOR] += 1
            if re.search(r"LDGSTS\S*\.128\S* \[R\d+\+0x", line):
                counts[arch, name][CONSTANT_COPY] += 1
    assert counts, "cuobjdump printed no code"
    return counts


def _built_archs() -> tuple[list[str], bool]:
    """Plain architectures as cuobjdump prints them, and whether there are sm_90a kernels."""
    archs = json.loads((PACKAGE / "_build_info.json").read_text())["archs"]
    plain = ["sm_" + arch.replace(".", "") for arch in archs if arch[-1].isdigit()]
    return plain, "9.0a" in archs


def test_code_for_every_recorded_architecture(instructions):
    plain, _ = _built_archs()
    # An older cuobjdump prints sm_90 for sm_90a.
    assert {arch.rstrip("a") for arch, _ in instructions} == set(plain)


def test_portable_kernels_are_there_for_every_plain_architecture(instructions):
    plain, sm90a = _built_archs()
    names = {arch: {name for a, name in instructions if a.rstrip("a") == arch} for arch in plain}
    for arch in plain:
        for kernel in (
            "prefill_kernel",
            "decode_kernel",
            "decode_prepare_kernel",
            "decode_prepare_light_kernel",
            "decode_combine_kernel",
            "encode_kernel",
            "encode_rows_kernel",
            "expand_kernel",
            "prefill_tiles_kernel",
            "rotate_queries_kernel",
            "expand_tiles_kernel",
        ):
            assert any(kernel in name for name in names[arch]), (arch, kernel)
    portable = set.intersection(*names.values())
    for arch in plain:
        extra = names[arch] - portable
        if len(plain) > 1 and arch == "sm_90" and sm90a:
            assert extra, "no kernel of sm_90a's own"
        elif len(plain) > 1:
            assert not extra, arch


def test_int8_prefill_uses_both_tensor_core_products(instructions):
    found = defaultdict(set)
    for (arch, name), counts in instructions.items():
        match = re.search(r"sm80.*prefill_kernel.*PrefillConfigILi(\d+)ELb([01])E", name)
        if match is None:
            continue
        head_dim, int8 = int(match.group(1)), match.group(2) == "1"
        found[arch].add((head_dim, int8))
        assert counts["HMMA.16816.F32"] > 0, (arch, name)
        assert (counts["IMMA.16832.S8.S8"] > 0) == int8, (arch, name)
    everything = {(head_dim, int8) for head_dim in HEAD_DIMS for int8 in (False, True)}
    plain, _ = _built_archs()
    assert dict(found) == {arch: everything for arch in plain}


def test_prefill_from_tiles_only_copies_and_multiplies(instructions):
    """The kernel that reads unpacked tiles has both products and no byte permutes in quantity."""
    found = defaultdict(set)
    for (arch, name), counts in instructions.items():
        match = re.search(r"sm80.*prefill_tiles_kernel.*PrefillConfigILi(\d+)ELb1ELb1E", name)
        if match is None:
            continue
        found[arch].add(int(match.group(1)))
        assert counts["HMMA.16816.F32"] > 0 and counts["IMMA.16832.S8.S8"] > 0, (arch, name)
        total = _by_family(counts)
        assert total["LDGSTS"] > 0, (arch, name)
        pages = next(
            c
            for (a, other), c in instructions.items()
            if a == arch and re.search(rf"prefill_kernel.*PrefillConfigILi{match.group(1)}ELb1E", other)
        )
        unpacking = sum(n for code, n in pages.items() if code.startswith("PRMT"))
        assert total["PRMT"] < unpacking - 40, (arch, name, total["PRMT"], unpacking)
    plain, _ = _built_archs()
    assert dict(found) == {arch: set(HEAD_DIMS) for arch in plain}


def _by_family(counts: Counter) -> Counter:
    """Instructions by the name before the first dot."""
    total = Counter()
    for code, n in counts.items():
        total[code.split(".")[0]] += n
    return total


def _wgmma_kernels(instructions, kernel: str) -> dict[int, list[tuple[str, Counter]]]:
    """(architecture, instruction counts) of a kernel of sm_90a's own, by head dimension."""
    found = defaultdict(list)
    for (arch, name), counts in instructions.items():
        if match := re.search(rf"sm90\d+{kernel}ILi(\d+)E", name):
            found[int(match.group(1))].append((arch, _by_family(counts)))
    _, sm90a = _built_archs()
    if not sm90a:
        assert not found, f"{kernel} outside sm_90a"
        pytest.skip("built without sm_90a")
    assert set(found) == set(HEAD_DIMS), kernel
    return found


def _hold_wgmma(head_dim: int, arch: str, total: Counter, products: tuple[str, ...]) -> None:
    who = (head_dim, arch)
    assert arch in ("sm_90", "sm_90a"), who
    for product in ("IGMMA", "HGMMA", "IMMA", "HMMA"):
        assert (total[product] > 0) == (product in products), (who, product)
    # Products are issued in batches: where the compiler cannot prove that nobody touches their
    # registers it makes each one wait for the one before.
    # (WARPGROUP.ARRIVE before a batch and WARPGROUP.DEPBAR after it.)
    assert total["WARPGROUP"] <= sum(total[product] for product in products), who
    assert total["LDL"] == total["STL"] == 0, who


def test_wgmma_prefill_uses_both_warpgroup_products(instructions):
    """int8 scores and fp16 values by wgmma and nothing else, fed by bulk copies."""
    for head_dim, kernels in _wgmma_kernels(instructions, "wgmma_prefill_kernel").items():
        for arch, total in kernels:
            _hold_wgmma(head_dim, arch, total, ("IGMMA", "HGMMA"))
            assert total["UBLKCP"] > 0, (head_dim, arch)  # bulk copies into shared memory
            assert total["USETMAXREG"] >= 2, (head_dim, arch)  # registers from producer to consumers
            assert total["IGMMA"] % (head_dim // 32) == 0, (head_dim, arch)  # whole rows of q k


def test_prepare_queries_rotates_by_warpgroup_products(instructions):
    for head_dim, kernels in _wgmma_kernels(instructions, "prepare_queries_kernel").items():
        for arch, total in kernels:
            _hold_wgmma(head_dim, arch, total, ("HGMMA",))
            assert total["HGMMA"] % (head_dim // 16) == 0, (head_dim, arch)  # whole rows of q R^T


# DecodeMode of csrc/device/decode_plan.h, by the IMMAs of a word of codes (8 dims of a lane) and a tile:
# two for each INT8 term of a key (csrc/device/decode_codes.h) and 16 rows.
DECODE_IMMAS = {"0": 2, "1": 2, "2": 0, "3": 4, "4": 4}


def test_decode_kernels_are_complete(instructions):
    """Every mode with its products and its pipeline; the exact mode's two INT8 terms on sm_90a alone."""
    found = defaultdict(set)
    for (arch, name), counts in instructions.items():
        match = re.search(r"decode_kernel.*DecodeConfigILi(\d+)E.*DecodeModeE(\d)ELb([01])ELb([01])E", name)
        if match is None:
            continue
        head_dim, mode, bulk, wide = int(match[1]), match[2], match[3] == "1", match[4] == "1"
        found[arch.rstrip("a")].add((head_dim, mode, bulk, wide))
        who, total = (arch, name), _by_family(counts)
        assert total["IMMA"] == DECODE_IMMAS[mode] * 2 * head_dim // 32, who  # two n8 tiles of keys
        assert total["HMMA"] > 0, who
        assert (total["UBLKCP"] > 0) == bulk and (total["LDGSTS"] > 0) == (not bulk), who
        assert bulk or counts[CONSTANT_COPY] >= 7, who  # an unrolled step of a span: the producers' work
        # 16 warps need registers of the producer's, and so do 8 of 32 rows.
        assert (total["USETMAXREG"] > 0) == (bulk and mode in "034" and head_dim <= 128), who
    plain, sm90a = _built_archs()
    portable = {
        (d, mode, False, wide)
        for d in HEAD_DIMS
        for mode in "012"
        for wide in (False, True)
        if (d, mode) != (256, "1") and (wide or d >= 128)
    }
    own = {
        (d, mode, True, wide)
        for d in HEAD_DIMS
        for mode in "0134"
        for wide in (False, True)
        if not (d == 256 and mode in "14") and (wide or d >= 128)
    }
    wanted = {arch: portable | (own if sm90a and arch == "sm_90" else set()) for arch in plain}
    assert dict(found) == wanted


def test_clusters_decode_by_both_tensor_core_products(instructions):
    """With the copy engine's boxes, for token-major pages, or without: runs, or pieces by cp.async."""
    found = set()
    for (arch, name), counts in instructions.items():
        if match := re.search(r"decode_cluster_kernel.*ClusterConfigILi(\d+)ELb([01])E", name):
            head_dim, boxes, total = int(match[1]), match[2] == "1", _by_family(counts)
            assert total["IMMA"] == DECODE_IMMAS["0"] * 2 * head_dim // 32, (arch, name)
            assert total["HMMA"] > 0 and total["UCGABAR_ARV"] > 0, (arch, name)
            assert (total["UTMALDG"] > 0) == boxes, (arch, name)
            assert (total["UBLKCP"] > 0) == (total["LDGSTS"] > 0) == (not boxes), (arch, name)
            found.add((head_dim, boxes))
    both = {(d, boxes) for d in (64, 128) for boxes in (False, True)}
    assert found == (both if _built_archs()[1] else set())


def test_store_on_hopper_rotates_by_warpgroup_products(instructions):
    """x through registers: the fence and the barrier are those of B, before the first tile."""
    found = set()
    for (arch, name), counts in instructions.items():
        if match := re.search(r"encode_wgmma_kernel.*EncodeWgmmaConfigI.*Li(\d+)E", name):
            total, steps = _by_family(counts), int(match[1]) // 16
            _hold_wgmma(int(match[1]), arch, total, ("HGMMA",))
            assert total["HGMMA"] == total["LDSM"] == steps, (arch, name)
            assert total["FENCE"] == total["BAR"] == 1, (arch, name)
            found.add(int(match[1]))
    assert found == ({64, 128} if _built_archs()[1] else set())


def test_tiles_are_expanded_for_both_prefill_kernels(instructions):
    """One kernel an image; that of sm_90a's own kernel is not built elsewhere."""
    portable, own = defaultdict(set), defaultdict(set)
    for arch, name in instructions:
        if match := re.search(r"expand_tiles_kernel.*PrefillImage.*PrefillConfigILi(\d+)ELb1ELb1E", name):
            portable[arch.rstrip("a")].add(int(match.group(1)))
        elif match := re.search(r"expand_tiles_kernel.*WgmmaImageILi(\d+)E", name):
            own[arch.rstrip("a")].add(int(match.group(1)))
    plain, sm90a = _built_archs()
    assert dict(portable) == {arch: set(HEAD_DIMS) for arch in plain}
    assert dict(own) == ({"sm_90": set(HEAD_DIMS)} if sm90a else {})


def test_descriptors_are_pairs_of_registers(instructions):
    """ptxas of CUDA 13.0 writes illegal instructions for some copies with an L2 policy."""
    assert not [kernel for kernel, counts in instructions.items() if counts[ODD_DESCRIPTOR]]


def test_no_kernel_touches_local_memory(instructions):
    spills = {}
    for kernel, counts in instructions.items():
        found = {code: n for code, n in counts.items() if code.split(".")[0] in ("LDL", "STL")}
        if found:
            spills[kernel] = found
    assert not spills


def test_no_kernel_has_a_stack_or_local_memory():
    name, seen, wrong = "", 0, []
    for line in _run("-res-usage").splitlines():
        if match := re.match(r"\s*Function (\S+):", line):
            name = match.group(1)
        elif match := re.search(r"STACK:(\d+) .*LOCAL:(\d+)", line):
            seen += 1
            if match.groups() != ("0", "0"):
                wrong.append((name, line.strip()))
    assert seen > 0 and not wrong
