"""Launch configurations: one table per kernel and architecture.

The numbers are tile sizes, warps and register caps; they change speed, and results only by rounding.  They
are bounded by shared memory (228 KB an SM on sm_90 and sm_100, 164 KB on sm_80, 100 KB on sm_86, sm_89 and
sm_120) and by the 65,536 registers of an SM; tests/test_triton_compile.py compiles a selection and fails on
spills.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowsConfig:
    """Vectors of one program of the kernels that encode, decode or rotate them."""

    rows: int
    chunk: int  # columns of the rotation at a time
    num_warps: int


@dataclass(frozen=True)
class PrefillConfig:
    """Tile of a prefill program."""

    block_m: int  # query rows
    block_n: int  # keys per step
    chunk: int  # columns of the output rotation at a time
    num_warps: int
    maxnreg: int | None = None  # cap on registers a thread


@dataclass(frozen=True)
class DecodeConfig:
    """Tiles of the decode kernels."""

    block_m: int  # query rows of a KV head
    block_n: int  # keys per step, and of a work unit
    num_warps: int
    programs_per_sm: int  # of the split kernel: what fits by registers and shared memory
    min_units: int  # smallest share of work units of a program
    chunk: int  # columns of the output rotation at a time
    maxnreg: int | None = None  # of the split kernel


#: Most query rows (query tokens times query heads per KV head) that the decode kernels take.
MAX_DECODE_ROWS = 64

#: Query rows of a KV head up to which a sequence of a prefill goes to the decode kernels: their smallest
#: tile.  A sequence of one token always does, as far as they take its group.
SHORT_ROWS = 16

#: [architecture][head_dim]; 96 shares the row of 128, to which it is padded.
#:
#: sm_90: two programs of 64 rows an SM rather than one of 128.  Both use all registers; two expand every key
#: twice (925 instructions a step of 64 keys against 756), but one's products overlap the other's softmax.
PREFILL: dict[str, dict[int, PrefillConfig]] = {
    "sm_80": {
        64: PrefillConfig(128, 64, 64, 8),
        128: PrefillConfig(128, 32, 64, 8),
        256: PrefillConfig(64, 32, 32, 8),
    },
    "sm_86": {
        64: PrefillConfig(128, 64, 64, 8),
        128: PrefillConfig(128, 32, 32, 8),
        256: PrefillConfig(64, 32, 16, 8),
    },
    "sm_90": {
        64: PrefillConfig(128, 64, 64, 8),
        128: PrefillConfig(64, 64, 64, 4),
        256: PrefillConfig(128, 32, 32, 8),
    },
    "sm_100": {
        64: PrefillConfig(128, 64, 64, 8),
        128: PrefillConfig(128, 32, 64, 8),
        256: PrefillConfig(64, 32, 32, 8),
    },
    "sm_120": {
        64: PrefillConfig(128, 64, 64, 8),
        128: PrefillConfig(128, 32, 32, 8),
        256: PrefillConfig(64, 32, 16, 8),
    },
}

#: [architecture][head_dim] for up to 16 query rows; more rows change block_m and num_warps.
#:
#: sm_90: four programs of two warps an SM rather than three of four: 0.48 ms at 64 x 8K instead of 0.52
#: (docs/tuning.md).
DECODE: dict[str, dict[int, DecodeConfig]] = {
    "sm_80": {
        64: DecodeConfig(16, 64, 4, 3, 4, 64),
        128: DecodeConfig(16, 64, 4, 2, 4, 64),
        256: DecodeConfig(16, 32, 4, 2, 4, 32),
    },
    "sm_86": {
        64: DecodeConfig(16, 64, 4, 3, 4, 32),
        128: DecodeConfig(16, 64, 4, 2, 4, 32),
        256: DecodeConfig(16, 32, 4, 2, 4, 16),
    },
    "sm_90": {
        64: DecodeConfig(16, 64, 4, 3, 4, 64),
        128: DecodeConfig(16, 64, 2, 4, 4, 64, maxnreg=255),
        256: DecodeConfig(16, 32, 4, 2, 4, 32),
    },
    "sm_100": {
        64: DecodeConfig(16, 64, 4, 3, 4, 64),
        128: DecodeConfig(16, 64, 4, 2, 4, 64),
        256: DecodeConfig(16, 32, 4, 2, 4, 32),
    },
    "sm_120": {
        64: DecodeConfig(16, 64, 4, 3, 4, 32),
        128: DecodeConfig(16, 64, 4, 2, 4, 32),
        256: DecodeConfig(16, 32, 4, 2, 4, 16),
    },
}


def architecture(capability: tuple[int, int]) -> str:
    """The tables' key for a compute capability; an unknown one gets that of its closest relative."""
    major, minor = capability
    if major == 8:
        return "sm_80" if minor in (0, 7) else "sm_86"
    if major == 9:
        return "sm_90"
    if major in (10, 11):
        return "sm_100"
    return "sm_120" if major >= 12 else "sm_80"


def _padded(head_dim: int) -> int:
    return 128 if head_dim == 96 else head_dim


def _power_of_two(rows: int) -> int:
    block = 16
    while block < rows:
        block *= 2
    return block


def prefill_config(capability: tuple[int, int], head_dim: int, max_rows: int) -> PrefillConfig:
    """Configuration of a prefill.

    Args:
        capability: of the device.
        head_dim: 64, 96, 128 or 256.
        max_rows: upper bound of query tokens times query heads per KV head of one sequence.
    """
    config = PREFILL[architecture(capability)][_padded(head_dim)]
    if max_rows > config.block_m // 2:
        return config
    return PrefillConfig(_power_of_two(max_rows), min(config.block_n, 64), config.chunk, 4)


def decode_config(capability: tuple[int, int], head_dim: int, max_rows: int) -> DecodeConfig:
    """Configuration of a decode with up to ``max_rows`` query rows per sequence and KV head."""
    config = DECODE[architecture(capability)][_padded(head_dim)]
    block_m = _power_of_two(max_rows)
    if block_m == config.block_m:
        return config
    warps = 8 if block_m == MAX_DECODE_ROWS else 4
    programs = 1 if block_m == MAX_DECODE_ROWS else min(config.programs_per_sm, 2)
    return DecodeConfig(block_m, config.block_n, warps, programs, config.min_units, config.chunk)


def short_query_len(group: int) -> int:
    """Most query tokens with which a sequence of a prefill goes to the decode kernels; 0: none does."""
    return max(1, SHORT_ROWS // group) if group <= MAX_DECODE_ROWS else 0


def _chunk(capability: tuple[int, int], head_dim: int) -> int:
    """Columns of a rotation at a time, by shared memory."""
    if head_dim == 256:
        return 32
    return 32 if architecture(capability) in ("sm_86", "sm_120") else 64


def queries_config(capability: tuple[int, int], head_dim: int) -> RowsConfig:
    """Configuration of the rotation of queries."""
    return RowsConfig(32 if head_dim == 256 else 64, _chunk(capability, head_dim), 4)


def encode_config(
    capability: tuple[int, int], head_dim: int, num_rows: int, element_bytes: int
) -> RowsConfig:
    """Configuration of store and compress for ``num_rows`` vectors of 2- or 4-byte elements.

    A program loads the whole rotation, so many vectors share one where there are enough to fill the GPU.
    """
    many = num_rows > 8192
    if head_dim == 256:
        return RowsConfig(32 if many else 16, 32, 8 if many else 4)
    if not many:
        return RowsConfig(32, 32, 4)
    if architecture(capability) == "sm_90" and element_bytes == 2:
        return RowsConfig(128, 64, 8)
    return RowsConfig(64, 32, 8)


def expand_config(capability: tuple[int, int], head_dim: int) -> RowsConfig:
    """Configuration of gather and decompress."""
    return RowsConfig(16 if head_dim == 256 else 64, 32, 4)
