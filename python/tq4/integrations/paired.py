"""How far one cache's losses are from another's on the same tokens, and how well that is known.

A 4-bit code is a step function, so two correct runs of a model on a TQ4 cache differ token by token, in
either direction: the difference of their means is noise around the true difference, and says nothing without
its standard error.  The runs see the same tokens, so the error is that of the paired differences, which is
many times smaller than that of either mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

#: Tokens whose differences may depend on each other: they read the same codes.
BLOCK = 256


@dataclass(frozen=True)
class Change:
    """``relative``: mean loss over the other's, minus 1; ``error``: its standard error, None if unknown."""

    relative: float
    error: float | None

    def __str__(self) -> str:
        known = "" if self.error is None else f" ± {100 * self.error:.3f}"
        return f"{100 * self.relative:+.3f}{known} %"


def change(losses: list[torch.Tensor], base: list[torch.Tensor], block: int = BLOCK) -> Change:
    """Relative difference of two mean losses, from losses of the same tokens.

    The standard error is that of a ratio of sums over blocks of tokens, taken as independent.

    Args:
        losses, base: of each window, floating ``[tokens]``.
        block: tokens of a block; a block does not cross windows.

    Raises:
        ValueError: windows of different lengths.
    """
    if [part.shape for part in losses] != [part.shape for part in base]:
        raise ValueError("losses: expected those of the same windows as base")
    mine, other = (
        torch.stack([piece.double().sum() for window in windows for piece in window.split(block)])
        for windows in (losses, base)
    )
    ratio = float(mine.sum() / other.sum())
    count = mine.numel()
    if count < 2:
        return Change(ratio - 1, None)
    residuals = mine - ratio * other
    return Change(
        ratio - 1, math.sqrt(count / (count - 1) * float(residuals.square().sum())) / float(other.sum())
    )
