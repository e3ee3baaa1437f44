"""The byte layout: its owner, the generated header, page views of tensors, and golden bytes."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tq4
from golden.make_format import element, inputs, unsqueeze
from support import ROOT, poisoned_cache
from tq4 import layout
from tq4.layout import HEAD_MAJOR, LAYOUTS, TOKEN_MAJOR, cache_shape, page_view

SOURCE = ROOT / "python" / "tq4" / "layout.py"
HEADER = ROOT / "csrc" / "layout.h"
PARAMS = ROOT / "csrc" / "params.h"
GOLDEN = json.loads((Path(__file__).parent / "golden" / "format.json").read_text())

SHAPES = [
    (head_dim, heads, block_size)
    for head_dim in layout.HEAD_DIMS
    for heads in (1, 2, 8)
    for block_size in (16, 48, 128)
]


# ---- The header.


def test_header_is_up_to_date():
    command = [sys.executable, "-I", str(SOURCE), "--header"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert text == HEADER.read_text(), "run: python -m tq4.layout --header > csrc/layout.h"
    assert text == layout.cpp_header()


def test_layout_imports_the_standard_library_only():
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module]
        for name in names:
            assert name.split(".")[0] in sys.stdlib_module_names


def test_page_view_has_the_fields_of_params_h():
    body = re.search(r"struct PageView \{(.*?)\};", PARAMS.read_text(), re.S).group(1)
    body = re.sub(r"//.*", "", body)
    names = set()
    for declaration in body.split(";"):
        words = declaration.replace("*", " ").replace(",", " ").split()
        names.update(words[1:])
    assert names - {"base"} == {field.name for field in dataclasses.fields(layout.PageView)}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_header_computes_the_same_numbers(tmp_path):
    lines = ['#include "layout.h"', "using namespace tq4;"]
    for i, (head_dim, heads, block_size) in enumerate(SHAPES):
        for name in LAYOUTS:
            cache = torch.empty(
                cache_shape(name, 3, heads, head_dim, block_size), dtype=torch.uint8, device="meta"
            )
            view = page_view(cache, heads, head_dim)
            inner = view.code_token_stride if name == TOKEN_MAJOR else view.code_head_stride
            lines.append(
                f"constexpr PageView {name}{i} = {name}_view(nullptr, 3, {heads}, {block_size}, {head_dim}, "
                f"{view.block_stride}, {inner});"
            )
            for field in dataclasses.fields(view):
                lines.append(f"static_assert({name}{i}.{field.name} == {getattr(view, field.name)});")
        lines.append(
            f"static_assert(token_bytes({heads}, {head_dim}) == {layout.token_bytes(heads, head_dim)});"
        )
        lines.append(
            f"static_assert(head_page_bytes({block_size}, {head_dim}) == "
            f"{layout.head_page_bytes(block_size, head_dim)});"
        )
    lines.append("static_assert(is_supported_head_dim(96) && !is_supported_head_dim(80));")
    source = tmp_path / "check.cpp"
    source.write_text("\n".join(lines))
    command = ["g++", "-std=c++17", "-Wall", "-Werror", "-fsyntax-only", f"-I{HEADER.parent}", str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---- Views.


@pytest.mark.parametrize(("head_dim", "heads", "block_size"), SHAPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_byte_of_a_block_has_exactly_one_owner(name, head_dim, heads, block_size):
    cache = torch.empty(cache_shape(name, 2, heads, head_dim, block_size), dtype=torch.uint8)
    view = page_view(cache, heads, head_dim)
    owned = []
    for token in range(block_size):
        for head in range(heads):
            code = token * view.code_token_stride + head * view.code_head_stride
            norm = token * view.norm_token_stride + head * view.norm_head_stride
            owned += range(view.k_codes + code, view.k_codes + code + head_dim // 2)
            owned += range(view.v_codes + code, view.v_codes + code + head_dim // 2)
            owned += range(view.k_norms + norm, view.k_norms + norm + 4)
            owned += range(view.v_norms + norm, view.v_norms + norm + 4)
            assert (view.k_norms + norm) % 4 == 0 and (view.v_norms + norm) % 4 == 0
    assert sorted(owned) == list(range(view.block_stride))
    assert view.block_stride == block_size * heads * (head_dim + 8)


def test_token_major_is_the_documented_row():
    heads, head_dim = 8, 128
    view = page_view(torch.empty(4, 16, 1100, dtype=torch.uint8), heads, head_dim)
    half = head_dim // 2
    assert (view.k_codes, view.k_norms) == (0, heads * half)
    assert (view.v_codes, view.v_norms) == (heads * (half + 4), heads * (half + 4) + heads * half)
    assert view.code_token_stride == view.norm_token_stride == 1100
    assert view.block_stride == 16 * 1100
    assert layout.token_bytes(heads, head_dim) == 1088
    # 136 bytes a token and head against 512 in fp16
    assert layout.vector_bytes(128) == 136


def test_strided_views_are_read_from_the_tensor():
    wide = torch.empty(6, 16, 300, dtype=torch.uint8)
    view = page_view(wide[::2, :, 4:], 2, 64)
    assert (view.num_blocks, view.block_stride, view.code_token_stride) == (3, 2 * 16 * 300, 300)
    # An engine's (block, head) view whose heads are outermost inside a block, with a gap between blocks.
    cache = poisoned_cache(5, 2, 64, 16, HEAD_MAJOR, row_padding=64)
    view = page_view(cache, 2, 64)
    assert view.block_stride == 2 * 16 * 72 + 64 and view.code_head_stride == 16 * 72


def test_heads_may_be_outermost():
    cache = torch.empty(2, 5, 16, 72, dtype=torch.uint8).transpose(0, 1)
    view = page_view(cache, 2, 64)
    assert view.block_stride == 16 * 72 and view.code_head_stride == 5 * 16 * 72


def test_strides_of_single_blocks_and_heads_do_not_matter():
    cache = torch.empty(1, 1, 16, 72, dtype=torch.uint8).as_strided((1, 1, 16, 72), (3, 5, 72, 1))
    view = page_view(cache, 1, 64)
    assert view.block_stride == view.code_head_stride == 16 * 72


@pytest.mark.parametrize(
    ("shape", "strides", "message"),
    [
        ((4, 16), None, "4-D head-major"),
        ((4, 16, 143), None, "at least num_kv_heads"),
        ((4, 8, 144), None, "multiple of 16, got 8"),
        ((4, 24, 144), None, "multiple of 16, got 24"),
        ((4, 16, 144), (16 * 144, 144, 2), "contiguous last dimension"),
        ((4, 16, 144), (16 * 146, 146, 1), "multiples of 4 bytes"),
        ((4, 16, 144), (16 * 144 + 2, 144, 1), "multiples of 4 bytes"),
        ((4, 16, 144), (16 * 144, 72, 1), "do not overlap"),
        ((4, 16, 144), (0, 144, 1), "do not overlap"),
        ((4, 16, 144), (8 * 144, 144, 1), "do not overlap"),
        ((4, 3, 16, 72), None, r"\[num_blocks, 2, block_size, 72\]"),
        ((4, 2, 16, 80), None, r"\[num_blocks, 2, block_size, 72\]"),
        ((4, 2, 8, 72), None, "multiple of 16, got 8"),
        ((4, 2, 16, 72), (4 * 16 * 72, 16 * 72, 80, 1), "last two dimensions contiguous"),
        ((4, 2, 16, 72), (16 * 72, 8 * 72, 72, 1), "do not overlap"),
        ((4, 2, 16, 72), (16 * 72, 3 * 16 * 72, 72, 1), "do not overlap"),
        ((4, 2, 16, 72), (32 * 72 + 2, 16 * 72, 72, 1), "multiples of 4 bytes"),
        ((4, 2, 16, 72), (2**33, 2**32, 72, 1), "less than 2"),
    ],
)
def test_bad_caches(shape, strides, message):
    cache = torch.empty(1, dtype=torch.uint8, device="meta")
    cache = cache.expand(shape) if strides is None else cache.new_empty_strided(shape, strides)
    if strides is None:
        cache = torch.empty(shape, dtype=torch.uint8, device="meta")
    with pytest.raises(ValueError, match="^cache: .*" + message):
        page_view(cache, 2, 64)


def test_unknown_layout():
    with pytest.raises(ValueError, match="layout: expected one of"):
        cache_shape("diagonal", 1, 1, 64, 16)


# ---- Golden bytes.


def f32(value: float) -> float:
    """Rounded to fp32."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def scalar_vector(x: list[float], signs: list[int] | None, norm_correction: bool) -> tuple[bytes, bytes]:
    """Codes and norm of one vector: the specification, one number at a time."""
    dim = len(x)
    centroids = [f32(c) for c in GOLDEN["centroids"]]
    boundaries = [f32((a + b) / 2) for a, b in zip(centroids, centroids[1:], strict=False)]
    norm = f32(math.sqrt(sum(v * v for v in x)))
    unit = [f32(v / f32(norm + 1e-10)) for v in x]
    if signs is None:
        y = unit
    else:
        # Row i of Sylvester's matrix has sign (-1)^popcount(i & j) in column j.
        scale = f32(1 / math.sqrt(dim))
        y = [
            f32(
                math.fsum(
                    (1 if bin(i & j).count("1") % 2 == 0 else -1) * (1 if signs[j] else -1) * scale * unit[j]
                    for j in range(dim)
                )
            )
            for i in range(dim)
        ]
    index = [sum(boundary < value for boundary in boundaries) for value in y]
    if norm_correction:
        length = f32(math.sqrt(math.fsum(centroids[i] ** 2 for i in index)))
        norm = f32(norm / length)
    codes = bytes(index[2 * j] << 4 | index[2 * j + 1] for j in range(dim // 2))
    return codes, struct.pack("<f", norm)


def scalar_cache(name: str, rotate: bool, norm_correction: bool) -> list[bytes]:
    """The blocks of the golden case, built field by field from the documented pictures of the two layouts."""
    heads, block_size, dim = GOLDEN["num_kv_heads"], GOLDEN["block_size"], GOLDEN["head_dim"]
    half = dim // 2
    signs = GOLDEN["hadamard_signs"] if rotate else None
    filler = (b"\xff" * half, b"\xff" * 4)
    # vector[kind][slot][head] = (codes, norm)
    vector = [[[filler] * heads for _ in range(2 * block_size)] for _ in range(2)]
    for token, slot in enumerate(GOLDEN["slot_mapping"]):
        if slot < 0:
            continue
        for kind in range(2):
            vector[kind][slot] = [
                scalar_vector([element(kind, token, head, d) for d in range(dim)], signs, norm_correction)
                for head in range(heads)
            ]
    blocks = []
    for block in range(2):
        slots = range(block * block_size, (block + 1) * block_size)
        data = b""
        if name == TOKEN_MAJOR:
            for slot in slots:
                for kind in range(2):
                    for part in range(2):
                        data += b"".join(vector[kind][slot][head][part] for head in range(heads))
        else:
            for head in range(heads):
                for part in range(2):
                    for kind in range(2):
                        data += b"".join(vector[kind][slot][head][part] for slot in slots)
        blocks.append(data)
    return blocks


@pytest.mark.parametrize(
    "case", GOLDEN["cases"], ids=lambda c: f"{c['layout']}-{c['rotate']}-{c['norm_correction']}"
)
def test_golden_bytes(case):
    golden = [unsqueeze(block) for block in case["blocks"]]
    assert scalar_cache(case["layout"], case["rotate"], case["norm_correction"]) == golden
    heads, dim, block_size = GOLDEN["num_kv_heads"], GOLDEN["head_dim"], GOLDEN["block_size"]
    cache = poisoned_cache(2, heads, dim, block_size, case["layout"])
    quantizer = tq4.Quantizer(dim, norm_correction=case["norm_correction"])
    slots = torch.tensor(GOLDEN["slot_mapping"])
    flags = {"rotate_k": case["rotate"], "rotate_v": case["rotate"]}
    tq4.store(inputs(0), inputs(1), cache, slots, quantizer, backend="reference", **flags)
    assert [bytes(block.flatten().tolist()) for block in cache] == golden


def test_golden_codebook_and_signs():
    quantizer = tq4.Quantizer(GOLDEN["head_dim"])
    assert quantizer.k_centroids.tolist() == GOLDEN["centroids"]
    assert (quantizer.k_rotation[0] > 0).int().tolist() == GOLDEN["hadamard_signs"]
