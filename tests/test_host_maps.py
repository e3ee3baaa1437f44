"""Device headers that also compile for the host, held against Python: layout, unpacking, swizzles, schedules.

tests/cpp/host_maps.cpp is compiled here with the plain C++ compiler (no nvcc) as a pybind11 module.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import random
import shutil
import subprocess
import sysconfig
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from support_attention import WIDE_TABLE_TOKENS
from tq4 import codebook, layout

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
HEAD_DIMS = (64, 96, 128, 256)

pytestmark = pytest.mark.skipif(not CSRC.is_dir(), reason="needs the sources under csrc/")


@pytest.fixture(scope="module")
def host_maps(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    pybind11 = pytest.importorskip("pybind11")
    source = ROOT / "tests" / "cpp" / "host_maps.cpp"
    digest = hashlib.sha256()
    for file in sorted([source, *source.parent.glob("*.h"), *CSRC.glob("*.h"), *CSRC.glob("device/*")]):
        digest.update(file.read_bytes())
    base = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        base = base.parent  # shared by the workers
    folder = base / f"host_maps-{digest.hexdigest()[:16]}"
    folder.mkdir(exist_ok=True)
    library = folder / f"host_maps{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}")
        includes = [pybind11.get_include(), sysconfig.get_paths()["include"], str(CSRC)]
        command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        command += ["-fvisibility=hidden", *(f"-I{i}" for i in includes), str(source), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        os.replace(partial, library)
    spec = importlib.util.spec_from_file_location("host_maps", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- layout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("block_size", [16, 128])
def test_token_major_view_equals_python(host_maps, head_dim, heads, block_size):
    for padding in (0, 4, 120):
        row = heads * (head_dim + 8) + padding
        cache = torch.empty((3, block_size, row), dtype=torch.uint8, device="meta")
        expected = asdict(layout.page_view(cache, heads, head_dim))
        assert host_maps.token_major_view(3, heads, block_size, head_dim, block_size * row, row) == expected


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("block_size", [16, 128])
def test_head_major_view_equals_python(host_maps, head_dim, heads, block_size):
    page = block_size * (head_dim + 8)
    # Contiguous, and as a view whose blocks lie side by side within each head.
    for block_stride, head_stride in ((heads * page, page), (page, 5 * page)):
        cache = torch.empty_strided(
            (5, heads, block_size, head_dim + 8),
            (block_stride, head_stride, head_dim + 8, 1),
            dtype=torch.uint8,
            device="meta",
        )
        expected = asdict(layout.page_view(cache, heads, head_dim))
        if heads == 1:
            head_stride = page  # the stride of a dimension of one is arbitrary and not passed on
        got = host_maps.head_major_view(5, heads, block_size, head_dim, block_stride, head_stride)
        assert got == expected


# ---- unpacking --------------------------------------------------------------------------------


def test_wide_tables_have_room_for_more_than_short_contexts(host_maps):
    assert host_maps.kClusterMostKeys < WIDE_TABLE_TOKENS


def _codes(word: int) -> list[int]:
    """The 8 codes of a packed little-endian word: even dimensions in the high nibbles."""
    packed = np.frombuffer(word.to_bytes(4, "little"), dtype=np.uint8)
    return np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1).tolist()


def test_unpack_int8_is_the_table_lookup_in_swapped_pairs(host_maps):
    rng = random.Random(3)
    for _ in range(300):
        table = [rng.randrange(256) for _ in range(16)]
        word = rng.randrange(2**32)
        natural = [table[code] for code in _codes(word)]
        swapped = [natural[i ^ 1] for i in range(8)]
        assert host_maps.unpack_int8(word, table) == swapped


def test_unpack_int8_sees_every_code_in_every_place(host_maps):
    table = list(range(100, 116))
    for place in range(8):
        for code in range(16):
            byte, high = divmod(place, 2)
            word = code << (8 * byte + (0 if high else 4))
            expected = [table[0]] * 8
            expected[place] = table[code]
            got = host_maps.unpack_int8(word, table)
            assert [got[i ^ 1] for i in range(8)] == expected


def test_unpack_fp16_is_exact_for_any_centroids(host_maps):
    rng = np.random.default_rng(4)
    for _ in range(300):
        centroids = (rng.standard_normal(16) * 10.0 ** rng.integers(-6, 4)).astype(np.float16)
        bits = centroids.view(np.uint16)
        word = int(rng.integers(2**32))
        halves = host_maps.unpack_fp16(word, (bits >> 8).tolist(), (bits & 255).tolist())
        assert halves == [int(bits[code]) for code in _codes(word)]


# ---- quantising -------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_cell_table_finds_the_same_index_as_the_boundaries(host_maps, head_dim):
    boundaries = torch.tensor(codebook.boundaries(codebook.centroids(head_dim)), dtype=torch.float32)
    generator = torch.Generator().manual_seed(head_dim)
    values = torch.cat(
        [
            torch.randn(4000, generator=generator) / head_dim**0.5,
            torch.linspace(-1, 1, 2001),
            (boundaries[:, None] + torch.linspace(-2e-5, 2e-5, 101)).flatten(),
        ]
    )
    usable, even, odd = host_maps.cell_indices(boundaries.tolist(), values.tolist())
    assert usable
    expected = torch.bucketize(values, boundaries)  # the number of boundaries below
    clear = (values[:, None] - boundaries).abs().amin(-1) > 1e-5  # what the format demands
    assert clear.sum() > 5000
    for indices in (even, odd):
        indices = torch.tensor(indices)
        assert torch.equal(indices[clear], expected[clear])
        assert (indices - expected).abs().max() <= 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda b: [0.0] * 15,
        lambda b: list(reversed(b)),
        lambda b: [*b[:7], float("nan"), *b[8:]],
        lambda b: [*b[:14], float("inf")],
        lambda b: [1e-5 * i for i in range(14)] + [0.5],
    ],
)
def test_cell_table_recognises_boundaries_it_cannot_serve(host_maps, spoil):
    boundaries = [float(x) for x in codebook.boundaries(codebook.centroids(128))]
    assert host_maps.cell_indices(boundaries, [0.0])[0]
    assert not host_maps.cell_indices(spoil(boundaries), [0.0])[0]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_fragment_maps_are_bijections_with_common_groups(host_maps, head_dim):
    inputs, codes, outputs = map(np.array, host_maps.fragment_map(head_dim))
    for dims in (inputs, codes, outputs):
        assert sorted(dims.flatten()) == list(range(head_dim))
        # A pair shares a code byte or a word of output: neighbouring dims, the even one first.
        pairs = dims.reshape(-1, 2)
        assert (pairs[:, 0] % 2 == 0).all() and (pairs[:, 1] == pairs[:, 0] + 1).all()
    for group in range(head_dim // 32):
        assert set(inputs[2 * group : 2 * group + 2].flat) == set(codes[4 * group : 4 * group + 4].flat)
    # The words of codes that a lane accumulates are consecutive bytes of its quarter.
    for t in range(4):
        mine = codes[:, 2 * t : 2 * t + 2].flatten()
        assert mine.tolist() == list(range(t * head_dim // 4, (t + 1) * head_dim // 4))


# ---- swizzles ---------------------------------------------------------------------------------


def _banks(offsets) -> set[int]:
    """Which of the eight 16-byte bank groups a quarter-warp's accesses touch."""
    return {offset // 16 % 8 for offset in offsets}


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_half_tile_is_a_conflict_free_bijection(host_maps, head_dim):
    rows = 64
    row_bytes, offsets = host_maps.half_tile(head_dim, rows)
    flat = [offset for row in offsets for offset in row]
    assert len(flat) == rows * head_dim // 8 == len(set(flat))
    assert all(offset % 16 == 0 and 0 <= offset < rows * row_bytes for offset in flat)
    for row in range(0, rows, 8):
        for chunk in range(head_dim // 8):  # ldmatrix reads a chunk column of 8 rows
            assert len(_banks(offsets[row + i][chunk] for i in range(8))) == 8
    for row in range(0, rows, 2):
        for chunk in range(0, head_dim // 8 - 3, 4):  # unpacking writes 4 chunks of 2 rows
            assert len(_banks(offsets[row + i // 4][chunk + i % 4] for i in range(8))) == 8


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("element_bytes", [1, 2])
def test_key_tile_is_a_conflict_free_bijection(host_maps, head_dim, element_bytes):
    rows = 64
    row_bytes, used, offsets = host_maps.key_tile(head_dim, element_bytes, rows)
    assert used == head_dim // 4 * element_bytes
    flat = [offset for row in offsets for quarter in row for offset in quarter]
    assert len(flat) == len(set(flat))
    assert all(offset % 16 == 0 and 0 <= offset < rows * row_bytes for offset in flat)
    assert len(offsets[0][0]) * 16 >= used
    for row in range(0, rows, 2):
        for chunk in range(len(offsets[0][0])):
            assert len(_banks(offsets[row + i // 4][i % 4][chunk] for i in range(8))) == 8


# ---- images of the wgmma kernels --------------------------------------------------------------


def _swizzled(row_bytes: int, rows: int, row: int, chunk: int) -> int:
    """Where the PTX ISA's 128-byte or 64-byte swizzle puts a 16-byte chunk of rows laid out in panels."""
    panel, within = divmod(16 * chunk, row_bytes)
    linear = panel * rows * row_bytes + row * row_bytes + within
    return linear ^ ((linear >> 7) % (row_bytes // 16) << 4)


def _hold_image(offsets, row_bytes: int, begin: int, end: int) -> None:
    """Distinct chunks inside [begin, end), swizzled, and eight rows of a chunk in eight bank groups."""
    rows = len(offsets)
    flat = [offset for row in offsets for offset in row]
    assert len(flat) == len(set(flat))
    assert all(begin <= offset <= end - 16 for offset in flat)
    for row, chunks in enumerate(offsets):
        assert chunks == [begin + _swizzled(row_bytes, rows, row, chunk) for chunk in range(len(chunks))]
    for row in range(0, rows, 8):
        for chunk in range(len(offsets[0])):
            assert len(_banks(offsets[row + i][chunk] for i in range(8))) == 8


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_wgmma_image_is_swizzled_without_overlap(host_maps, head_dim):
    image = host_maps.wgmma_image(head_dim)
    tokens, key_row = image["tokens"], 64 if head_dim == 64 else 128
    assert [len(row) for row in image["key_offsets"]] == [head_dim // 16] * tokens
    assert [len(row) for row in image["value_offsets"]] == [head_dim // 8] * tokens
    _hold_image(image["key_offsets"], key_row, 0, image["values"])
    _hold_image(image["value_offsets"], 128, image["values"], image["norms"])
    assert image["values"] + image["value_bytes"] == image["norms"]
    # The swizzles repeat every 1024 bytes: parts begin at multiples of that in shared memory.
    assert image["values"] % 1024 == 0 and image["value_bytes"] % 1024 == 0
    assert image["bytes"] == image["norms"] + 4 * tokens and image["bytes"] % 128 == 0


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_wgmma_image_has_a_norm_a_token_in_order(host_maps, head_dim):
    image = host_maps.wgmma_image(head_dim)
    data = np.frombuffer(image["scaled"], dtype=np.uint8)
    assert not data[: image["norms"]].any()
    norms = data[image["norms"] :].view(np.float32)
    assert norms.tolist() == list(range(1, image["tokens"] + 1))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_wgmma_query_image_is_one_of_keys_with_scales(host_maps, head_dim):
    image = host_maps.wgmma_image(head_dim)
    rows = image["query_rows"]
    assert rows % 64 == 0 and [len(row) for row in image["query_offsets"]] == [head_dim // 16] * rows
    _hold_image(image["query_offsets"], 64 if head_dim == 64 else 128, 0, image["query_scales"])
    assert image["query_bytes"] == image["query_scales"] + 4 * rows


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_wgmma_rotation_image_is_in_tiles_of_values(host_maps, head_dim):
    image = host_maps.wgmma_image(head_dim)
    tokens, size = image["tokens"], image["value_bytes"]
    offsets = image["rotation_offsets"]
    assert image["rotation_tiles"] == -(-head_dim // tokens)
    flat = [offset for row in offsets for offset in row]
    assert len(flat) == head_dim * head_dim // 8 == len(set(flat))
    assert all(0 <= offset <= image["rotation_tiles"] * size - 16 for offset in flat)
    for row in range(head_dim):
        tile, token = divmod(row, tokens)
        values = image["value_offsets"][token]
        assert offsets[row] == [tile * size + offset - image["values"] for offset in values]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_wgmma_rotation_columns_are_the_dims_in_an_order_to_store(host_maps, head_dim):
    dims = host_maps.wgmma_image(head_dim)["rotation_dims"]  # [chunk][pair], the first of two
    columns = [dim + odd for chunk in dims for dim in chunk for odd in range(2)]
    assert sorted(columns) == list(range(head_dim))
    # Lane t of a row holds columns 8 chunk + 2 t, + 1: of every four chunks eight dims side by side.
    for block in range(head_dim // 32):
        for t in range(4):
            mine = [dims[4 * block + i][t] + odd for i in range(4) for odd in range(2)]
            assert mine == list(range(32 * block + 8 * t, 32 * block + 8 * t + 8))


# ---- schedules --------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("rows", [16, 64, 128])
def test_prefill_slots_cover_every_row_once(host_maps, group, rows):
    rng = random.Random(group * 1000 + rows)
    for _ in range(60):
        lengths = [rng.choice([0, 1, rng.randrange(150)]) for _ in range(rng.randrange(1, 10))]
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        expected = [
            (seq, starts[seq], length, row)
            for seq, length in enumerate(lengths)
            for row in range(0, length * group, rows)
        ]
        tiles = host_maps.prefill_tiles(starts, group, rows)
        assert [tile for tile in tiles if tile[0] >= 0] == expected
        assert len(tiles) == host_maps.prefill_slots(starts[-1], group, rows, len(lengths))
        assert len(tiles) <= len(expected) + len(lengths)


def test_visible_keys_is_the_hull_of_the_mask(host_maps):
    rng = random.Random(5)
    for _ in range(2000):
        first = rng.randrange(-20, 60)
        last = first + rng.randrange(16)
        left, right, num_keys = rng.randrange(-1, 20), rng.randrange(-1, 20), rng.randrange(60)
        position = np.arange(first, last + 1)[:, None]
        key = np.arange(num_keys)[None, :]
        mask = np.ones((last - first + 1, num_keys), dtype=bool)
        if left >= 0:
            mask &= key >= position - left
        if right >= 0:
            mask &= key <= position + right
        visible = np.flatnonzero(mask.any(axis=0))
        begin, end = host_maps.visible_keys(first, last, left, right, num_keys)
        if visible.size == 0:
            assert begin >= end
        else:
            assert (begin, end) == (visible[0], visible[-1] + 1)


def test_visible_keys_does_not_overflow(host_maps):
    largest = 2**31 - 1
    assert host_maps.visible_keys(5, 9, largest, largest, 100) == (0, 100)
    assert host_maps.visible_keys(-(2**30), 2**30, -1, -1, 2**31 - 1)[0] == 0


def _visible_tiles(length, queries, left, right):
    position = np.arange(length - queries, length)[:, None]
    key = np.arange(length)[None, :]
    mask = np.ones((queries, length), dtype=bool)
    if left >= 0:
        mask &= key >= position - left
    if right >= 0:
        mask &= key <= position + right
    visible = np.flatnonzero(mask.any(axis=0))
    return set(range(visible[0] // 16, visible[-1] // 16 + 1)) if visible.size else set()


@pytest.mark.parametrize("grid", [1, 7, 132])
def test_decode_shares_cover_every_visible_tile_once_and_evenly(host_maps, grid):
    rng = random.Random(grid)
    for _ in range(150):
        lengths = [rng.choice([0, 1, rng.randrange(700)]) for _ in range(rng.randrange(1, 8))]
        starts = [0]
        for _length in lengths:
            starts.append(starts[-1] + rng.randrange(4))
        if rng.random() < 0.5:
            starts = []
        left, right = rng.choice([-1, rng.randrange(200)]), rng.choice([-1, 0])
        chunks, cost = rng.randrange(1, 4), rng.randrange(1, 4)
        segments = host_maps.decode_segments(lengths, starts, left, chunks, cost, grid)
        covered = [(s, c, tile) for _, s, c, begin, end in segments for tile in range(begin, end)]
        expected = set()
        for seq, length in enumerate(lengths):
            queries = starts[seq + 1] - starts[seq] if starts else 1
            tiles = _visible_tiles(length, queries, left, right) if length else set()
            expected |= {(seq, chunk, tile) for chunk in range(chunks) for tile in tiles}
        assert len(covered) == len(set(covered))
        assert set(covered) == expected
        # No share is larger than an equal one, rounded up.
        units = {(s, c) for s, c, _ in expected}
        total = len(expected) + cost * len(units)
        for cta in range(grid):
            mine = sum(end - begin for k, _, _, begin, end in segments if k == cta)
            assert mine <= -(-total // grid)
