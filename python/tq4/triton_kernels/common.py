"""Steps that several Triton kernels share: page addresses, nibble expansion, rotation, row scales.

Dimension order inside the kernels.  A code byte holds dimension 2j in its high and 2j + 1 in its low nibble.
Expanding ``D / 2`` bytes gives one tensor of high and one of low nibbles; the kernels put them side by side
instead of interleaving them, because a concatenation of register tiles is free and an interleaving costs a
byte permute per register.  Column c of every [rows, 2 * HALF] tile is therefore dimension

    dims(c) = 2 * (c % HALF) + c // HALF        "even | odd"

with HALF = D / 2 rounded up to a power of two (columns with ``c % HALF >= D / 2`` are padding and hold
zeros).  The order is undone for free by loading the rows of a rotation matrix in it, or by one register
permutation (:func:`interleave`) where there is no rotation.

Nibble expansion.  A 16-entry table lookup by ``prmt.b32`` (:data:`LOOKUP_BYTES_PTX`,
:data:`LOOKUP_HALVES_PTX`): a gather from memory per element is what makes table-based attention kernels slow.
Selector field i of a ``prmt`` picks one of 8 bytes, so 16 entries take two lookups and one selecting
``prmt``; four nibbles are looked up at a time.  Each asm block is truly elementwise (output element i depends
on input byte i only), so the compiler may assign bytes to threads as it likes.  Without PTX (the interpreter)
a table load does the same.

fp16 products with fp32 accuracy.  Rotations multiply with fp16 tensor-core products and fp32 accumulation:
a matrix entry is split into high + low fp16 parts (22 bits), and an input that is not fp16 is scaled by an
exact power of two per row first (bf16 then fits), and split alike (fp32).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

#: Tokens that are certain to lie in one page, with consecutive addresses: block_size is a multiple of it.
GROUP_TOKENS = tl.constexpr(16)
#: log2(e) and ln(2): the kernels' softmax works in base 2.
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
#: Start of the running maximum: below every real score, and finite so that no inf - inf can occur.
LOWEST = tl.constexpr(-1.0e30)
#: 1.5 * 2**23.  Adding it to a float rounds it half-to-even and leaves the integer in the low mantissa bits;
#: an int32 accumulator that starts at its bits reads as the float 12582912 + sum, for |sum| < 2**22.
MAGIC = tl.constexpr(12582912.0)
MAGIC_BITS = tl.constexpr(0x4B400000)


class Pages(NamedTuple):
    """Where the fields of a page lie (bytes): the compile-time part of :class:`tq4.layout.PageView`."""

    block_size: int
    block_stride: int
    k_codes: int
    k_norms: int
    v_codes: int
    v_norms: int
    code_token_stride: int
    code_head_stride: int
    norm_token_stride: int
    norm_head_stride: int
    #: Largest power of two <= 16 that divides the base address and every code offset and stride.
    alignment: int


# One 32-bit register holds the codes of 8 dimensions.  `a` are the low three bits of each nibble, `s` the
# selector of the final prmt: byte i of the first operand, or of the second where bit 3 of nibble i is set.
# Inputs of a scalar appear four times ($3..$6 are one table word): one register for each packed element.
LOOKUP_BYTES_PTX = tl.constexpr(
    """
    {
    .reg .b32 a, s, x, y, z, w;
    and.b32 a, $2, 0x77777777;
    shr.u32 s, $2, 1;
    lop3.b32 s, s, 0x44444444, 0x32103210, 0xEA;
    prmt.b32 x, $3, $7, a;
    prmt.b32 y, $11, $15, a;
    prmt.b32 z, x, y, s;
    shr.u32 a, a, 16;
    shr.u32 s, s, 16;
    prmt.b32 x, $3, $7, a;
    prmt.b32 y, $11, $15, a;
    prmt.b32 w, x, y, s;
    prmt.b32 $0, z, w, 0x7531;
    prmt.b32 $1, z, w, 0x6420;
    }
    """
)
LOOKUP_BYTES_CONSTRAINTS = tl.constexpr("=r,=r" + ",r" * 17)

# fp16 entries: their low and high bytes are looked up separately and zipped by the last prmt, which also
# separates high nibbles ($0, $1) from low ones ($2, $3).
_LOOKUP_HALVES = """
    {
    .reg .b32 a, s, x, y, l0, h0, l1, h1;
    and.b32 a, $4, 0x77777777;
    shr.u32 s, $4, 1;
    lop3.b32 s, s, 0x44444444, 0x32103210, 0xEA;
    prmt.b32 x, $5, $9, a;
    prmt.b32 y, $13, $17, a;
    prmt.b32 l0, x, y, s;
    prmt.b32 x, $21, $25, a;
    prmt.b32 y, $29, $33, a;
    prmt.b32 h0, x, y, s;
    shr.u32 a, a, 16;
    shr.u32 s, s, 16;
    prmt.b32 x, $5, $9, a;
    prmt.b32 y, $13, $17, a;
    prmt.b32 l1, x, y, s;
    prmt.b32 x, $21, $25, a;
    prmt.b32 y, $29, $33, a;
    prmt.b32 h1, x, y, s;
    prmt.b32 $0, l0, h0, 0x7351;
    prmt.b32 $1, l1, h1, 0x7351;
    prmt.b32 $2, l0, h0, 0x6240;
    prmt.b32 $3, l1, h1, 0x6240;
"""
LOOKUP_HALVES_PTX = tl.constexpr(_LOOKUP_HALVES + "    }\n")
LOOKUP_HALVES_CONSTRAINTS = tl.constexpr("=r,=r,=r,=r" + ",r" * 33)
# The same, times the fp16 factors of the four elements ($37, $38).
LOOKUP_SCALED_HALVES_PTX = tl.constexpr(
    _LOOKUP_HALVES
    + """
    mul.f16x2 $0, $0, $37;
    mul.f16x2 $1, $1, $38;
    mul.f16x2 $2, $2, $37;
    mul.f16x2 $3, $3, $38;
    }
    """
)
LOOKUP_SCALED_HALVES_CONSTRAINTS = tl.constexpr("=r,=r,=r,=r" + ",r" * 35)


@triton.jit
def dims(HALF: tl.constexpr):
    """Dimension of each of the 2 * HALF columns of an "even | odd" tile."""
    c = tl.arange(0, 2 * HALF)
    return 2 * (c % HALF) + c // HALF


@triton.jit
def concatenate(even, odd):
    """[rows, HALF] twice -> [rows, 2 * HALF], side by side."""
    return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 1)), (even.shape[0], 2 * even.shape[1]))


@triton.jit
def interleave(x):
    """[rows, even | odd] -> [rows, natural order]."""
    half: tl.constexpr = x.shape[1] // 2
    return tl.reshape(tl.permute(tl.reshape(x, (x.shape[0], 2, half)), (0, 2, 1)), (x.shape[0], 2 * half))


@triton.jit
def deinterleave(x):
    """[rows, natural order] -> [rows, even | odd]."""
    half: tl.constexpr = x.shape[1] // 2
    return tl.reshape(tl.permute(tl.reshape(x, (x.shape[0], half, 2)), (0, 2, 1)), (x.shape[0], 2 * half))


@triton.jit
def power_of_two(x):
    """For x >= 0 the power of two p with p <= x < 2p, kept in [2**-100, 2**100]; 2**100 for inf or NaN."""
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.minimum(tl.maximum(bits, 27 << 23), 227 << 23)
    return bits.to(tl.float32, bitcast=True)


# ---- Sequences.


@triton.jit
def first_slot(starts, seq, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """First tile slot of a sequence: starts[seq] * GROUP rows come before it, in tiles of BLOCK rows.

    floor(rows before / BLOCK) + seq leaves every sequence room for ceil(its rows / BLOCK) tiles, so that
    slots never overlap and their number, floor(all rows / BLOCK) + num_seqs, follows from host-known shapes.
    """
    return (tl.load(starts + seq).to(tl.int64) * GROUP // BLOCK).to(tl.int32) + seq


@triton.jit
def find_sequence(starts, slot, num_seqs, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The last sequence whose first slot is not after ``slot``, by bisection."""
    low = 0
    high = num_seqs - 1
    while low < high:
        middle = (low + high + 1) // 2
        if first_slot(starts, middle, GROUP, BLOCK) <= slot:
            low = middle
        else:
            high = middle - 1
    return low


# ---- Pages.


@triton.jit
def group_offsets(table, first_token, last_group, P: tl.constexpr, TOKENS: tl.constexpr):
    """Byte offsets of the pages of TOKENS tokens from first_token (a multiple of 16) on.

    Token groups after ``last_group`` repeat it, so that no block_table entry past a sequence's end is read.

    Returns:
        int64 [TOKENS / 16] offsets of the pages, int32 [TOKENS / 16] first token of each group in its page.
    """
    group = tl.minimum(first_token // GROUP_TOKENS + tl.arange(0, TOKENS // GROUP_TOKENS), last_group)
    groups_per_page: tl.constexpr = P.block_size // GROUP_TOKENS
    page = tl.load(table + group // groups_per_page).to(tl.int64)
    return page * P.block_stride, (group % groups_per_page) * GROUP_TOKENS


@triton.jit
def token_offsets(page, token, STRIDE: tl.constexpr):
    """Byte offsets int64 [TOKENS] of the tokens of some groups (of :func:`group_offsets`)."""
    first = page + token * STRIDE
    # Token 8 i + 2 t + r, added in this order: in a product's layout t is a lane and i and r are registers,
    # so that the last two additions become immediate offsets.
    lanes = (tl.arange(0, 4) * (2 * STRIDE))[None, None, :, None]
    rows = (tl.arange(0, 2) * (8 * STRIDE))[None, :, None, None]
    pairs = (tl.arange(0, 2) * STRIDE)[None, None, None, :]
    offsets = first[:, None, None, None] + lanes + rows + pairs
    return tl.reshape(offsets, (first.shape[0] * GROUP_TOKENS,))


@triton.jit
def load_codes(base, offsets, D: tl.constexpr, HALF: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Code words uint32 [TOKENS, HALF / 4]; words past D / 8 are zero."""
    word = tl.arange(0, HALF // 4)
    # The hint has to be put on a value made in this function: a function argument would lose it.
    address = tl.multiple_of((base + offsets).to(tl.pointer_type(tl.uint32)), ALIGNMENT)
    address = address[:, None] + word[None, :]
    if D == 2 * HALF:
        return tl.load(address)
    else:  # an else, as what follows a return is still compiled
        return tl.load(address, mask=(word < D // 8)[None, :], other=0)


@triton.jit
def load_tile(
    cache,
    table,
    head,
    first_token,
    last_group,
    P: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """K and V of TOKENS tokens of one head: code words [TOKENS, HALF / 4] and fp32 norms [TOKENS].

    Nothing is masked: the norms (and codes) of tokens past the sequence's end are garbage that the caller
    must select away.
    """
    page, token = group_offsets(table, first_token, last_group, P, TOKENS)
    codes = token_offsets(page, token, P.code_token_stride)
    norms = token_offsets(page, token, P.norm_token_stride)
    k_base = cache + P.k_codes + head * P.code_head_stride
    v_base = cache + P.v_codes + head * P.code_head_stride
    k_words = load_codes(k_base, codes, D, HALF, P.alignment)
    v_words = load_codes(v_base, codes, D, HALF, P.alignment)
    norm_type: tl.constexpr = tl.pointer_type(tl.float32)
    k_norm = tl.load((cache + P.k_norms + head * P.norm_head_stride + norms).to(norm_type))
    v_norm = tl.load((cache + P.v_norms + head * P.norm_head_stride + norms).to(norm_type))
    return k_words, v_words, k_norm, v_norm


# ---- Nibble expansion.


@triton.jit
def bytes_of(words):
    """uint32 [rows, W] -> uint8 [rows, 4 W], little-endian (register renaming only, once compiled)."""
    low = tl.join((words & 0xFF).to(tl.uint8), ((words >> 16) & 0xFF).to(tl.uint8))
    high = tl.join(((words >> 8) & 0xFF).to(tl.uint8), ((words >> 24) & 0xFF).to(tl.uint8))
    return tl.reshape(tl.join(low, high), (words.shape[0], 4 * words.shape[1]))


@triton.jit
def _word(b0, b1, b2, b3):
    """Four bytes as a table word in an ordinary register.

    The word is the same in all threads.  Where registers are scarce ptxas moves such values to uniform
    registers, which prmt cannot read, and copies them back for every use (120 moves per step of the decode
    loop).  It does not see through the exchange with a neighbour below, so the word counts as divergent.
    """
    word = (b0 | (b1 << 8) | (b2 << 16) | (b3 << 24)).to(tl.uint32, bitcast=True)
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 lane, other, x;
        mov.u32 lane, %laneid;
        xor.b32 other, lane, 1;
        xor.b32 x, $1, lane;
        shfl.sync.idx.b32 x, x, other, 31, -1;
        xor.b32 $0, x, other;
        }
        """,
        "=r,r",
        [word],
        dtype=tl.uint32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def byte_table(codes, PTX: tl.constexpr):
    """The 16 int8 codes as 4 table words (only made where PTX uses them)."""
    if PTX:
        w0 = _code_word(codes, 0)
        w1 = _code_word(codes, 4)
        w2 = _code_word(codes, 8)
        w3 = _code_word(codes, 12)
        return w0, w1, w2, w3
    else:
        zero = tl.full((), 0, tl.uint32)
        return zero, zero, zero, zero


@triton.jit
def _code_word(codes, i: tl.constexpr):
    b0 = tl.load(codes + i).to(tl.int32) & 0xFF
    b1 = tl.load(codes + i + 1).to(tl.int32) & 0xFF
    b2 = tl.load(codes + i + 2).to(tl.int32) & 0xFF
    b3 = tl.load(codes + i + 3).to(tl.int32) & 0xFF
    return _word(b0, b1, b2, b3)


@triton.jit
def half_scale(centroids):
    """The power of two p with max|centroid| in [p, 2p): fp16 tables hold centroid / p."""
    largest = tl.abs(tl.load(centroids))
    for i in tl.static_range(1, 16):
        largest = tl.maximum(largest, tl.abs(tl.load(centroids + i)))
    return power_of_two(largest)


@triton.jit
def half_table(centroids, scale, PTX: tl.constexpr):
    """fp16(centroid / scale) as 4 words of low bytes and 4 words of high bytes."""
    inverse = 1.0 / scale
    if PTX:
        l0, h0 = _half_words(centroids, inverse, 0)
        l1, h1 = _half_words(centroids, inverse, 4)
        l2, h2 = _half_words(centroids, inverse, 8)
        l3, h3 = _half_words(centroids, inverse, 12)
        return l0, l1, l2, l3, h0, h1, h2, h3
    else:
        zero = tl.full((), 0, tl.uint32)
        return zero, zero, zero, zero, zero, zero, zero, zero


@triton.jit
def _half_bits(centroids, inverse_scale, i: tl.constexpr):
    value = (tl.load(centroids + i) * inverse_scale).to(tl.float16)
    return value.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def _half_words(centroids, inverse_scale, i: tl.constexpr):
    c0 = _half_bits(centroids, inverse_scale, i)
    c1 = _half_bits(centroids, inverse_scale, i + 1)
    c2 = _half_bits(centroids, inverse_scale, i + 2)
    c3 = _half_bits(centroids, inverse_scale, i + 3)
    low = _word(c0 & 0xFF, c1 & 0xFF, c2 & 0xFF, c3 & 0xFF)
    return low, _word(c0 >> 8, c1 >> 8, c2 >> 8, c3 >> 8)


@triton.jit
def expand_bytes(words, codes, table, PTX: tl.constexpr):
    """Code words [TOKENS, HALF / 4] -> int8 codes[index] [TOKENS, 2 * HALF], even | odd."""
    byte = bytes_of(words)
    if PTX:
        even, odd = tl.inline_asm_elementwise(
            LOOKUP_BYTES_PTX,
            LOOKUP_BYTES_CONSTRAINTS,
            [byte, table[0], table[1], table[2], table[3]],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        even = tl.load(codes + (byte >> 4).to(tl.int32))
        odd = tl.load(codes + (byte & 15).to(tl.int32))
    return concatenate(even, odd)


@triton.jit
def expand_halves(words, centroids, scale, table, PTX: tl.constexpr):
    """Code words [TOKENS, HALF / 4] -> fp16(centroid / scale) [TOKENS, 2 * HALF], even | odd."""
    byte = bytes_of(words)
    if PTX:
        even, odd = tl.inline_asm_elementwise(
            LOOKUP_HALVES_PTX,
            LOOKUP_HALVES_CONSTRAINTS,
            [byte, table[0], table[1], table[2], table[3], table[4], table[5], table[6], table[7]],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        even = (tl.load(centroids + (byte >> 4).to(tl.int32)) * (1.0 / scale)).to(tl.float16)
        odd = (tl.load(centroids + (byte & 15).to(tl.int32)) * (1.0 / scale)).to(tl.float16)
    return concatenate(even, odd)


@triton.jit
def expand_values(words, norm, centroids, scale, table, PTX: tl.constexpr):
    """Decoded vectors fp16 [TOKENS, 2 * HALF], even | odd: fp16(centroid / scale) * fp16(norm * scale).

    scale is a power of two, so this is fp16(c) * norm but for the rounding of the norm to fp16 (2**-12) and
    of the product; the norm may be scale**-1 times larger than fp16's largest number.
    """
    byte = bytes_of(words)
    factor = (norm * scale).to(tl.float16)[:, None]
    if PTX:
        even, odd = tl.inline_asm_elementwise(
            LOOKUP_SCALED_HALVES_PTX,
            LOOKUP_SCALED_HALVES_CONSTRAINTS,
            [byte, table[0], table[1], table[2], table[3], table[4], table[5], table[6], table[7], factor],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        even = (tl.load(centroids + (byte >> 4).to(tl.int32)) * (1.0 / scale)).to(tl.float16) * factor
        odd = (tl.load(centroids + (byte & 15).to(tl.int32)) * (1.0 / scale)).to(tl.float16) * factor
    return concatenate(even, odd)


# ---- Rotation.


@triton.jit
def split_half(x):
    """fp32 x, |x| < 65504 -> fp16 high and low parts, x = high + low to 22 bits."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def rotate_rows(
    rows,
    row_valid,
    rotation,
    D: tl.constexpr,
    HALF: tl.constexpr,
    CHUNK: tl.constexpr,
    ROTATION_SCALE: tl.constexpr,
):
    """x @ R^T of some rows, fp32 [ROWS, 2 * HALF], even | odd (or x itself where rotation is None).

    Args:
        rows: pointers [ROWS] to the D contiguous elements (fp16, bf16 or fp32) of each row.
        row_valid: bool [ROWS]; other rows are read as zeros.
        CHUNK: columns of R at a time, which bounds the shared memory.
        ROTATION_SCALE: factor that brings the entries of R near 1, so that their low parts are fp16 normals.
    """
    ROWS: tl.constexpr = rows.shape[0]
    natural = tl.arange(0, 2 * HALF)
    valid = row_valid[:, None] & (natural < D)[None, :]
    if rotation is None:
        x = tl.load(rows[:, None] + natural[None, :], mask=valid, other=0.0)
        return deinterleave(x.to(tl.float32))
    else:
        dim = dims(HALF)
        exact: tl.constexpr = rows.dtype.element_ty == tl.float16
        if exact:
            scale = tl.full((ROWS,), 1.0, tl.float32)
        else:
            whole = tl.load(rows[:, None] + natural[None, :], mask=valid, other=0.0).to(tl.float32)
            scale = power_of_two(tl.max(tl.abs(whole), 1))
        inverse = 1.0 / scale
        result = tl.zeros((ROWS, 2 * HALF), tl.float32)
        for first in tl.range(0, 2 * HALF, CHUNK, num_stages=1):
            column = first + tl.arange(0, CHUNK)
            inside = (column < D)[None, :]
            x = tl.load(rows[:, None] + column[None, :], mask=row_valid[:, None] & inside, other=0.0)
            r = tl.load(
                rotation + dim[:, None] * D + column[None, :], mask=(dim < D)[:, None] & inside, other=0.0
            )
            r_high, r_low = split_half(r * ROTATION_SCALE)
            if exact:
                result = tl.dot(x, r_high.T, result)
                result = tl.dot(x, r_low.T, result)
            else:
                x_high, x_low = split_half(x.to(tl.float32) * inverse[:, None])
                result = tl.dot(x_high, r_high.T, result)
                result = tl.dot(x_high, r_low.T, result)
                if rows.dtype.element_ty == tl.float32:
                    result = tl.dot(x_low, r_high.T, result)
        return result * (scale * (1.0 / ROTATION_SCALE))[:, None]


@triton.jit
def store_rotated(
    x,
    out_rows,
    row_valid,
    rotation,
    D: tl.constexpr,
    HALF: tl.constexpr,
    CHUNK: tl.constexpr,
    ROTATION_SCALE: tl.constexpr,
):
    """[7] rotate back: x @ R of x fp32 [ROWS, even | odd] to the rows' pointers (rotation None: x itself)."""
    dtype: tl.constexpr = out_rows.dtype.element_ty
    if rotation is None:
        column = tl.arange(0, 2 * HALF)
        valid = row_valid[:, None] & (column < D)[None, :]
        tl.store(out_rows[:, None] + column[None, :], interleave(x).to(dtype), mask=valid)
    else:
        dim = dims(HALF)
        x = tl.where((dim < D)[None, :], x, 0.0)
        # A power of two a row keeps small outputs out of fp16's subnormals.
        scale = power_of_two(tl.max(tl.abs(x), 1))
        halves = (x * (1.0 / scale)[:, None]).to(tl.float16)
        scale = (scale * (1.0 / ROTATION_SCALE))[:, None]
        for first in tl.range(0, 2 * HALF, CHUNK, num_stages=1):
            column = first + tl.arange(0, CHUNK)
            inside = (column < D)[None, :]
            r = tl.load(
                rotation + dim[:, None] * D + column[None, :], mask=(dim < D)[:, None] & inside, other=0.0
            )
            rotated = tl.dot(halves, (r * ROTATION_SCALE).to(tl.float16)) * scale
            tl.store(out_rows[:, None] + column[None, :], rotated.to(dtype), mask=row_valid[:, None] & inside)


@triton.jit
def rotate_back_exact(
    x,
    first,
    rotation,
    D: tl.constexpr,
    HALF: tl.constexpr,
    CHUNK: tl.constexpr,
    ROTATION_SCALE: tl.constexpr,
):
    """Columns first .. first + CHUNK - 1 of x @ R, to fp32 accuracy; x fp32 [ROWS, even | odd], |x| < 2."""
    dim = dims(HALF)
    column = first + tl.arange(0, CHUNK)
    r = tl.load(
        rotation + dim[:, None] * D + column[None, :],
        mask=(dim < D)[:, None] & (column < D)[None, :],
        other=0.0,
    )
    r_high, r_low = split_half(r * ROTATION_SCALE)
    x_high, x_low = split_half(x)
    result = tl.dot(x_high, r_high)
    result = tl.dot(x_high, r_low, result)
    result = tl.dot(x_low, r_high, result)
    return result * (1.0 / ROTATION_SCALE)
