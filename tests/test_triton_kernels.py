"""The parts of the Triton kernels, each against a few lines of Python.

The ops as a whole are compared with the reference backend in test_attention.py, test_decode.py, test_store.py
and test_gather.py.  Here the kernels are interpreted; the inline PTX, which the interpreter cannot run, is
executed by a small emulator of the instructions it uses.
"""

from __future__ import annotations

import os
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import tq4

triton = pytest.importorskip("triton")
tl = triton.language

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("these tests interpret the kernels on the CPU", allow_module_level=True)

from tq4.backends import reference  # noqa: E402
from tq4.backends import triton as backend  # noqa: E402
from tq4.backends.arguments import Attention  # noqa: E402
from tq4.triton_kernels import common, configs, encode  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on inf and NaN, in the interpreter

# ---- Nibble expansion in PTX.


def _prmt(a: int, b: int, selector: int) -> int:
    source = (a | b << 32).to_bytes(8, "little")
    out = 0
    for i in range(4):
        field = selector >> 4 * i & 15
        byte = source[field & 7]
        if field & 8:  # replicate the sign
            byte = 0xFF if byte & 0x80 else 0
        out |= byte << 8 * i
    return out


def _mul_f16x2(a: int, b: int) -> int:
    x = np.array([a, b], np.uint32).view(np.float16).reshape(2, 2)
    return int((x[0] * x[1]).view(np.uint32)[0])


def _emulate(ptx: str, inputs: list[int], num_outputs: int) -> list[int]:
    """Run an asm block whose outputs are $0 .. and whose inputs follow them."""
    registers: dict[str, int] = {f"${num_outputs + i}": value for i, value in enumerate(inputs)}

    def value(text: str) -> int:
        return registers[text] if text in registers else int(text, 0)

    for statement in re.findall(r"[^;{}]+;", ptx):
        opcode, _, operands = statement.strip(" ;\n\t").partition(" ")
        if opcode == ".reg":
            continue
        target, *sources = (operand.strip() for operand in operands.split(","))
        a, b, *rest = (value(source) for source in sources)
        if opcode == "and.b32":
            result = a & b
        elif opcode == "shr.u32":
            result = a >> b
        elif opcode == "lop3.b32":
            assert rest[1] == 0xEA, "the only function used: (a & b) | c"
            result = (a & b) | rest[0]
        elif opcode == "prmt.b32":
            result = _prmt(a, b, rest[0])
        elif opcode == "mul.f16x2":
            result = _mul_f16x2(a, b)
        else:
            raise AssertionError(f"unknown instruction {opcode}")
        registers[target] = result
    return [registers[f"${i}"] for i in range(num_outputs)]


def _words(table: np.ndarray) -> list[int]:
    return [int(w) for w in table.view(np.uint32)]


def _operands(*words: int) -> list[int]:
    """A scalar operand of an asm block with pack=4 appears once for each of the 4 packed elements."""
    return [word for word in words for _ in range(4)]


def _code_words(count: int = 200) -> list[int]:
    rng = random.Random(0)
    every = [int(f"{i:x}" * 8, 16) for i in range(16)]
    return every + [0x01234567, 0x89ABCDEF] + [rng.getrandbits(32) for _ in range(count)]


def _nibbles(word: int) -> tuple[list[int], list[int]]:
    """High (even dimensions) and low nibbles of the four bytes."""
    data = word.to_bytes(4, "little")
    return [b >> 4 for b in data], [b & 15 for b in data]


def test_ptx_byte_lookup_is_a_table_lookup():
    table = np.array([-128, -104, -79, -62, -48, -36, -25, -15, 5, 15, 25, 36, 48, 62, 79, 127], np.int8)
    operands = _operands(*_words(table))
    for word in _code_words():
        even, odd = _emulate(common.LOOKUP_BYTES_PTX.value, [word, *operands], 2)
        expected = [table[i].tobytes() for i in _nibbles(word)]
        assert [even.to_bytes(4, "little"), odd.to_bytes(4, "little")] == expected


def _half_operands(table: np.ndarray) -> list[int]:
    data = table.view(np.uint8).reshape(16, 2)
    return _operands(*_words(data[:, 0].copy()), *_words(data[:, 1].copy()))


@pytest.mark.parametrize("symmetric", [True, False])
def test_ptx_half_lookup_is_a_table_lookup(symmetric):
    rng = np.random.default_rng(0)
    table = (
        np.linspace(-1.9, 1.9, 16).astype(np.float16) if symmetric else rng.normal(size=16).astype(np.float16)
    )
    operands = _half_operands(table)
    factors = np.array([1.5, -0.25, 3.0, 1e-3], np.float16)
    factor_words = _words(factors)
    for word in _code_words():
        high, low = _nibbles(word)
        even, odd = table[high], table[low]
        out = _emulate(common.LOOKUP_HALVES_PTX.value, [word, *operands], 4)
        assert out == [*_words(even), *_words(odd)]
        scaled = _emulate(common.LOOKUP_SCALED_HALVES_PTX.value, [word, *operands, *factor_words], 4)
        assert scaled == [*_words(even * factors), *_words(odd * factors)]


@pytest.mark.parametrize(
    ("ptx", "constraints", "outputs"),
    [
        (common.LOOKUP_BYTES_PTX, common.LOOKUP_BYTES_CONSTRAINTS, 2),
        (common.LOOKUP_HALVES_PTX, common.LOOKUP_HALVES_CONSTRAINTS, 4),
        (common.LOOKUP_SCALED_HALVES_PTX, common.LOOKUP_SCALED_HALVES_CONSTRAINTS, 4),
    ],
)
def test_ptx_operands_match_their_constraints(ptx, constraints, outputs):
    kinds = constraints.value.split(",")
    assert kinds.count("=r") == outputs and kinds[:outputs] == ["=r"] * outputs
    used = {int(i) for i in re.findall(r"\$(\d+)", ptx.value)}
    assert max(used) < len(kinds)


def test_magic_accumulator_is_exact():
    """The bits of 12582912.0 plus an integer are the float 12582912 + integer (|q8 . k8| < 2**22)."""
    rng = np.random.default_rng(0)
    sums = np.concatenate(
        [[0, 1, -1, 127 * 127 * 256, -127 * 127 * 256], rng.integers(-(2**22), 2**22, 1000)]
    )
    bits = (common.MAGIC_BITS.value + sums).astype(np.int32)
    assert np.array_equal(bits.view(np.float32).astype(np.float64) - common.MAGIC.value, sums)


# ---- Small kernels around single steps.


@triton.jit
def _power_of_two_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, common.power_of_two(tl.load(x + i)))


def test_power_of_two():
    values = [1.0, 1.99, 2.0, 3e-5, 1e-45, 0.0, 6e37, 2.0**99, float("inf")] + [0.7] * 7
    x = torch.tensor(values)
    out = torch.empty_like(x)
    _power_of_two_kernel[(1,)](x, out, N=16)
    expected = [1.0, 1.0, 2.0, 2.0**-16, 2.0**-100, 2.0**-100, 2.0**100, 2.0**99, 2.0**100]
    assert out.tolist() == expected + [0.5] * 7


@triton.jit
def _order_kernel(x, out, N: tl.constexpr):
    row = tl.arange(0, 2)[:, None]
    column = tl.arange(0, N)[None, :]
    block = tl.load(x + row * N + column)
    tl.store(out + row * N + column, common.deinterleave(block))
    tl.store(out + 2 * N + row * N + column, common.interleave(common.deinterleave(block)))
    tl.store(out + 4 * N + tl.arange(0, N), common.dims(N // 2))


def test_even_odd_order():
    x = torch.arange(32, dtype=torch.int32).reshape(2, 16)
    out = torch.empty(5, 16, dtype=torch.int32)
    _order_kernel[(1,)](x, out, N=16)
    order = [*range(0, 16, 2), *range(1, 16, 2)]
    assert torch.equal(out[:2], x[:, order])
    assert torch.equal(out[2:4], x)
    assert out[4].tolist() == order


@triton.jit
def _index_kernel(y, boundaries, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, encode._index(tl.load(y + i), boundaries))


def test_index_counts_the_boundaries_below():
    boundaries = tq4.Quantizer(64).k_boundaries
    ties = torch.cat([boundaries, boundaries.nextafter(torch.tensor(9.0)), -boundaries])
    extreme = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e30, -1e30])
    y = torch.cat([ties, extreme, torch.randn(256 - ties.numel() - 7) * 0.2])
    out = torch.empty(256, dtype=torch.int32)
    _index_kernel[(1,)](y, boundaries, out, N=256)
    assert torch.equal(out.long(), (y[:, None] > boundaries).sum(1))


@triton.jit
def _rotate_kernel(
    x,
    rotation,
    out,
    D: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    SCALE: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    y = common.rotate_rows(x + row * D, row < ROWS - 1, rotation, D, HALF, CHUNK, SCALE)
    column = tl.arange(0, 2 * HALF)
    tl.store(out + row[:, None] * (2 * HALF) + column[None, :], y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("head_dim", "rotation"), [(64, "hadamard"), (96, "haar"), (128, "haar")])
def test_rotation_has_fp32_accuracy(dtype, head_dim, rotation):
    half = backend._half(head_dim)
    matrix = tq4.Quantizer(head_dim, rotation=rotation).k_rotation
    magnitudes = torch.tensor([1.0, 1e-3, 300.0, 0.0] if dtype == torch.float16 else [1.0, 1e-20, 1e30, 0.0])
    x = (torch.randn(16, head_dim) * magnitudes.repeat(4)[:, None]).to(dtype)
    x[:, 3] *= 20
    out = torch.empty(16, 2 * half)
    scale = head_dim**0.5
    _rotate_kernel[(1,)](x, matrix, out, D=head_dim, HALF=half, ROWS=16, CHUNK=32, SCALE=scale)
    expected = torch.zeros(16, 2 * half, dtype=torch.float64)
    y = x.double() @ matrix.double().T
    expected[:, : head_dim // 2] = y[:, 0::2]
    expected[:, half : half + head_dim // 2] = y[:, 1::2]
    expected[-1] = 0  # not valid
    lengths = x.double().norm(dim=1, keepdim=True).clamp_min(1e-300)
    assert ((out - expected) / lengths).abs().max() < 5e-7


@triton.jit
def _slots_kernel(starts, num_seqs, out, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    slot = tl.program_id(0)
    seq = common.find_sequence(starts, slot, num_seqs, GROUP, BLOCK)
    tl.store(out + 2 * slot, seq)
    tl.store(out + 2 * slot + 1, slot - common.first_slot(starts, seq, GROUP, BLOCK))


@pytest.mark.parametrize("group", [1, 7, 8])
def test_tile_slots_cover_every_tile_once(group):
    rng = random.Random(group)
    for _ in range(4):
        lengths = [
            rng.choice([0, 0, 1, 2, 15, 16, 17, rng.randrange(60)]) for _ in range(rng.randrange(1, 8))
        ]
        starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        slots = sum(lengths) * group // 16 + len(lengths)
        out = torch.empty(slots, 2, dtype=torch.int32)
        _slots_kernel[(slots,)](starts, len(lengths), out, GROUP=group, BLOCK=16)
        found = {(seq, tile) for seq, tile in out.tolist() if tile * 16 < lengths[seq] * group}
        assert found == {(s, t) for s, n in enumerate(lengths) for t in range(-(-n * group // 16))}
        assert sum(tile * 16 < lengths[seq] * group for seq, tile in out.tolist()) == len(found)


# ---- Ops, where Triton's own decisions matter.


def _problem(seq_lens, query_lens, *, head_dim=64, group=2, kv_heads=1, rotation="hadamard", seed=0):
    """Arguments of an attention op over a cache with shuffled pages and poisoned tails."""
    generator = torch.Generator().manual_seed(seed)
    quantizer = tq4.Quantizer(head_dim, rotation=rotation)
    pages = [-(-n // 16) for n in seq_lens]
    cache = tq4.PagedCache(sum(pages) + 2, kv_heads, head_dim)
    cache.tensor.fill_(0xFF)
    order = torch.randperm(sum(pages) + 2, generator=generator).int()
    table = torch.full((len(pages), max(pages) + 2), 2**30, dtype=torch.int32)
    for seq, (count, length) in enumerate(zip(pages, seq_lens, strict=True)):
        table[seq, :count], order = order[:count], order[count:]
        slots = (table[seq, :count, None].long() * 16 + torch.arange(16)).flatten()[:length]
        k, v = torch.randn(2, length, kv_heads, head_dim, generator=generator)
        tq4.store(k, v, cache, slots, quantizer, backend="reference")
    starts = torch.tensor([0, *np.cumsum(query_lens)], dtype=torch.int32)
    q = torch.randn(int(starts[-1]), kv_heads * group, head_dim, generator=generator).half()
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    return Attention.of(
        q, cache.tensor, table, lens, starts, quantizer, kv_heads, max_query_len=max(query_lens)
    )


def _answer(op, arguments, **changes):
    out = torch.full_like(arguments.q, 7.0)
    lse = torch.full((out.shape[1], out.shape[0]), 7.0)
    op(**vars(replace(arguments, out=out, lse=lse, **changes)))
    return out, lse


@pytest.mark.parametrize("seed", range(3))
def test_decode_shares_of_random_lengths(seed):
    """Any mix of lengths, so that sequences begin, end and are cut at every place of a share."""
    rng = random.Random(seed)
    seq_lens = [rng.choice([0, 1, 16, 63, 64, 65, rng.randrange(400)]) for _ in range(rng.randrange(2, 14))]
    query_lens = [rng.choice([1, 1, 2, 0]) for _ in seq_lens]
    query_lens[0] = 2
    arguments = _problem(seq_lens, query_lens, kv_heads=rng.choice([1, 2]), seed=seed)
    out, lse = _answer(backend.decode, arguments)
    expected, expected_lse = _answer(reference.decode, arguments, int8=False)
    assert (out.float() - expected.float()).norm() <= 2e-3 * expected.float().norm()
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    again, _ = _answer(backend.decode, arguments)
    assert torch.equal(out, again)


def test_decode_of_many_rows_goes_to_the_prefill_kernel():
    arguments = _problem([80], [9], group=8)
    assert 9 * 8 > configs.MAX_DECODE_ROWS
    out, _ = _answer(backend.decode, arguments)
    expected, _ = _answer(reference.decode, arguments, int8=False)
    assert (out.float() - expected.float()).norm() <= 2e-3 * expected.float().norm()
    arguments = _problem([80, 33], [1, 1], group=66)
    out, _ = _answer(backend.decode, arguments, query_start_loc=None)
    expected, _ = _answer(reference.decode, arguments, query_start_loc=None, int8=False)
    assert (out.float() - expected.float()).norm() <= 2e-3 * expected.float().norm()


@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("rotation", ["hadamard", None])
@pytest.mark.parametrize("op", ["prefill", "decode"])
def test_bad_queries_stay_in_their_rows(op, rotation, int8):
    """Without a rotation only one coordinate of the row is bad: integers alone would hide it."""
    arguments = _problem([70], [4], rotation=rotation)
    run = getattr(backend, op)
    clean, _ = _answer(run, arguments, int8=int8)
    for value in (float("nan"), float("inf")):
        q = arguments.q.clone()
        q[1, 0, 5] = value
        out, lse = _answer(run, arguments, q=q, int8=int8)
        assert out[1, 0].isnan().all() and lse[0, 1].isnan()
        same = torch.ones(4, 2, dtype=torch.bool)
        same[1, 0] = False
        assert torch.equal(out[same], clean[same])


def test_zero_queries_average_the_visible_keys():
    """A zero row has scale 0; its masked scores must not become 0 * -inf."""
    arguments = _problem([40], [40])
    q = torch.zeros_like(arguments.q)
    out, lse = _answer(backend.prefill, arguments, q=q)
    expected, expected_lse = _answer(reference.prefill, arguments, q=q)
    assert (out.float() - expected.float()).norm() <= 1e-3 * expected.float().norm()
    assert torch.allclose(lse, expected_lse, atol=1e-5)


# ---- Configurations.


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (13, 0)])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_every_configuration_is_launchable(capability, head_dim):
    for rows in (1, 4, 16, 17, 64, 65, 4096):
        prefill = configs.prefill_config(capability, head_dim, rows)
        assert prefill.block_m >= min(rows, 16) and prefill.block_m & (prefill.block_m - 1) == 0
        assert prefill.block_n % 16 == 0 and (prefill.block_m >= rows or prefill.block_m >= 64)
        if rows <= configs.MAX_DECODE_ROWS:
            decode = configs.decode_config(capability, head_dim, rows)
            assert rows <= decode.block_m <= configs.MAX_DECODE_ROWS and decode.block_n % 16 == 0
    for config in (
        configs.queries_config(capability, head_dim),
        configs.expand_config(capability, head_dim),
        *(configs.encode_config(capability, head_dim, n, b) for n in (1, 100_000) for b in (2, 4)),
    ):
        assert config.rows % 16 == 0 and config.chunk >= 16 and config.num_warps in (4, 8)


def test_unknown_architectures_get_their_closest_relative():
    names = {
        (8, 0): "sm_80",
        (8, 6): "sm_86",
        (8, 9): "sm_86",
        (9, 0): "sm_90",
        (10, 3): "sm_100",
        (12, 1): "sm_120",
    }
    for capability, name in names.items():
        assert configs.architecture(capability) == name


def test_tuning_times_candidates_and_restores_the_table():
    from tq4.triton_kernels import tune

    shape = {"batch": 2, "kv_len": 40, "head_dim": 64, "heads": (2, 1), "device": torch.device("cpu")}
    for op, query_len, table in (("prefill", 40, configs.PREFILL), ("decode", 1, configs.DECODE)):
        before = {name: dict(row) for name, row in table.items()}
        every = tune.prefill_candidates if op == "prefill" else tune.decode_candidates
        results = tune.tune(op, query_len=query_len, candidates=list(every(64))[:2], **shape)
        assert len(results) == 2 and results[0][0] <= results[1][0] < float("inf")
        assert table == before
