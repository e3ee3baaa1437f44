"""Writes format.json beside this file: golden bytes of the cache format, made once by the reference backend.

The format is frozen: run this again only to add cases.  tests/test_layout.py checks the bytes against the
reference backend and, independently, against a scalar implementation in plain Python.

    python tests/golden/make_format.py
"""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path

import torch

import tq4
from tq4.layout import LAYOUTS, cache_shape

HEAD_DIM, KV_HEADS, BLOCK_SIZE, BLOCKS = 64, 2, 16, 2
SLOTS = [19, 0, -1, 15, 16, 30]  # six tokens over two pages, one skipped


def element(kind: int, token: int, head: int, dim: int) -> float:
    """Deterministic input, exact in fp16: kind 0 is K, 1 is V.  Token 3 is all zeros."""
    if token == 3:
        return 0.0
    return ((kind * 11 + token * 7 + head * 13 + dim * dim * 3 + dim * 29) % 31 - 15) / 8 * (token + 1)


def inputs(kind: int) -> torch.Tensor:
    """fp16 [tokens, heads, dim]."""
    return torch.tensor(
        [
            [[element(kind, t, h, d) for d in range(HEAD_DIM)] for h in range(KV_HEADS)]
            for t in range(len(SLOTS))
        ],
        dtype=torch.float16,
    )


def squeeze(data: bytes) -> str:
    """Most of a block is 0xFF: zlib, as text."""
    return base64.b64encode(zlib.compress(data, 9)).decode()


def unsqueeze(text: str) -> bytes:
    """The inverse of :func:`squeeze`."""
    return zlib.decompress(base64.b64decode(text))


def main() -> None:
    cases = []
    for layout in LAYOUTS:
        for rotate in (False, True):
            for norm_correction in (False, True):
                quantizer = tq4.Quantizer(HEAD_DIM, norm_correction=norm_correction)
                cache = torch.full(
                    cache_shape(layout, BLOCKS, KV_HEADS, HEAD_DIM, BLOCK_SIZE), 0xFF, dtype=torch.uint8
                )
                tq4.store(
                    inputs(0),
                    inputs(1),
                    cache,
                    torch.tensor(SLOTS),
                    quantizer,
                    rotate_k=rotate,
                    rotate_v=rotate,
                    backend="reference",
                )
                cases.append(
                    {
                        "layout": layout,
                        "rotate": rotate,
                        "norm_correction": norm_correction,
                        "blocks": [squeeze(bytes(block.flatten().tolist())) for block in cache],
                    }
                )
    rotation = tq4.Quantizer(HEAD_DIM).k_rotation
    golden = {
        "head_dim": HEAD_DIM,
        "num_kv_heads": KV_HEADS,
        "block_size": BLOCK_SIZE,
        "slot_mapping": SLOTS,
        "centroids": tq4.Quantizer(HEAD_DIM).k_centroids.tolist(),
        "hadamard_signs": (rotation[0] > 0).int().tolist(),
        "cases": cases,
    }
    Path(__file__).with_name("format.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
