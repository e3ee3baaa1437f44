"""Launch configurations, one table per kernel and architecture.

The numbers are tile sizes, warps and register caps; they change speed, never results beyond rounding.  They
are constrained by shared memory (228 KB an SM on sm_90 and sm_100, 164 KB on sm_80, 100 KB on sm_86, sm_89 and
sm_120) and by registers: tests/test_triton_compile.py compiles every entry and fails on a spill it does not
list.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowsConfig:
    """Vectors of one program of the kernels that rotate: queries, store."""

    rows: int
    chunk: int  # columns of the rotation at a time
    num_warps: int


@dataclass(frozen=True)
class PrefillConfig:
    """Tile of a prefill program."""

    block_m: int  # query rows
    block_n: int  # keys per step
    chunk: int  # columns of a rotation at a time
    num_warps: int


def _architecture(capability: tuple[int, int]) -> str:
    """The row of a table for a compute capability; unknown ones get that of the closest known relative."""
    major, minor = capability
    if major == 8:
        return "sm_80" if minor in (0, 7) else "sm_86"
    if major == 9:
        return "sm_90"
    if major in (10, 11):
        return "sm_100"
    return "sm_120" if major >= 12 else "sm_80"


#: [architecture][head_dim]; 96 shares the row of 128 (it is padded to it).
PREFILL: dict[str, dict[int, PrefillConfig]] = {
    "sm_80": {
        64: PrefillConfig(128, 64, 64, 8),
        128: PrefillConfig(128, 64, 64, 8),
        256: PrefillConfig(64, 32, 32, 8),
    },
    "sm_86": {
        64: PrefillConfig(128, 64, 64, 8),
        128: PrefillConfig(128, 64, 32, 8),
        256: PrefillConfig(64, 32, 16, 8),
    },
    "sm_90": {
        64: PrefillConfig(128, 64, 64, 8),
        128: PrefillConfig(128, 64, 64, 8),
        256: PrefillConfig(128, 64, 32, 8),
    },
    "sm_100": {
        64: PrefillConfig(128, 64, 64, 8),
        128: PrefillConfig(128, 64, 64, 8),
        256: PrefillConfig(64, 32, 32, 8),
    },
    "sm_120": {
        64: PrefillConfig(128, 64, 64, 8),
        128: PrefillConfig(128, 64, 32, 8),
        256: PrefillConfig(64, 32, 16, 8),
    },
}


def prefill_config(capability: tuple[int, int], head_dim: int, max_rows: int) -> PrefillConfig:
    """Configuration of a prefill.

    Args:
        capability: of the device.
        head_dim: 64, 96, 128 or 256.
        max_rows: upper bound of query tokens times query heads per KV head of one sequence.
    """
    config = PREFILL[_architecture(capability)][128 if head_dim == 96 else head_dim]
    if max_rows > config.block_m // 2:
        return config
    block_m = 16
    while block_m < max_rows:
        block_m *= 2
    return PrefillConfig(block_m, config.block_n, config.chunk, 4)


def _chunk(capability: tuple[int, int], head_dim: int) -> int:
    """Columns of a rotation at a time, by shared memory."""
    if head_dim == 256:
        return 32
    return 32 if _architecture(capability) in ("sm_86", "sm_120") else 64


def queries_config(capability: tuple[int, int], head_dim: int) -> RowsConfig:
    """Configuration of the rotation of queries."""
    return RowsConfig(32 if head_dim == 256 else 64, _chunk(capability, head_dim), 4)


def encode_config(capability: tuple[int, int], head_dim: int, num_rows: int) -> RowsConfig:
    """Configuration of store and compress for ``num_rows`` vectors.

    A program loads the whole rotation, so many vectors share one where there are enough to fill the GPU.
    """
    chunk = _chunk(capability, head_dim)
    if head_dim == 256:
        return RowsConfig(32, chunk, 8) if num_rows > 4096 else RowsConfig(16, chunk, 4)
    return RowsConfig(128, chunk, 8) if num_rows > 8192 else RowsConfig(32, chunk, 4)


def expand_config(capability: tuple[int, int], head_dim: int) -> RowsConfig:
    """Configuration of gather and decompress."""
    return RowsConfig(32 if head_dim == 256 else 64, 32, 4)


@dataclass(frozen=True)
class DecodeConfig:
    """Tiles of the decode kernels."""

    block_m: int  # query rows of a KV head
    block_n: int  # keys per step, and of a work unit
    num_warps: int
    programs_per_sm: int  # of the split kernel: what fits by registers and shared memory
    min_units: int  # smallest share of work units of a program
    chunk: int  # columns of the output rotation at a time


#: Most query rows (query tokens times query heads per KV head) that the decode kernels take.
MAX_DECODE_ROWS = 64


def decode_config(capability: tuple[int, int], head_dim: int, max_rows: int) -> DecodeConfig:
    """Configuration of a decode with up to ``max_rows`` query rows per sequence and KV head."""
    block_m = 16
    while block_m < max_rows:
        block_m *= 2
    small = _architecture(capability) in ("sm_86", "sm_120")  # 100 KB of shared memory
    if head_dim == 256:
        return DecodeConfig(block_m, 32, 4, 1 if small else 2, 4, 32)
    return DecodeConfig(block_m, 64, 4, 2 if small else 4, 4, 64)
