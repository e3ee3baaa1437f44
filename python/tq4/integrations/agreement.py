"""Whether backends choose the same next token: a given text decoded on their own caches, and on one cache.

The text is fed one token at a time (teacher forcing), so every backend sees the same tokens whatever it would
have chosen.  Two questions are asked, because their answers differ:

own caches
    Each backend stores and reads a cache of its own, from the prompt on: two servers that differ in nothing
    but the backend.  A 4-bit code is a step function: a difference in the last bits of a layer's input moves
    some codes of the next layer by a whole cell, and those codes stay.  Two correct backends drift apart.

one cache
    The first backend stores the prompt and the text.  At each position every other backend makes the same
    step, the model's forward of that one token, over the bytes the first one has stored; what it stored for
    the token itself is taken back before the next backend's turn.  Nothing accumulates: what differs is one
    step's arithmetic.  In some steps of the first backend, the others also answer each layer's very queries
    from its pages: the relative error of one attention call, without the model around it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from .cache import CompressedKV, TQ4Layer
from .transformers import TQ4Cache

#: One step in so many compares each layer's attention.
_ATTENTION_EVERY = 8


@dataclass
class Agreement:
    """Shares of equal next-token argmaxes, over ``tokens`` decoded positions.

    Attributes:
        backends: the first one stored the cache of ``one_cache``.
        tokens: positions of all sequences together.
        with_text: of each backend's own cache, with the text that was fed.
        own_caches, one_cache: of each pair, "first, second".  ``one_cache`` is empty where a layer of the
            cache cannot take a token back (recurrent layers).
        attention_error: of each backend but the first and each TQ4 layer, ``|o - o1| / |o1|`` of the
            attention outputs on one cache.
    """

    backends: list[str]
    tokens: int
    with_text: dict[str, float] = field(default_factory=dict)
    own_caches: dict[str, float] = field(default_factory=dict)
    one_cache: dict[str, float] = field(default_factory=dict)
    attention_error: dict[str, list[float]] = field(default_factory=dict)


class _SharedLayer(TQ4Layer):
    """A layer whose queries other backends answer too, from the same pages."""

    def attend(
        self, handle: CompressedKV, query: torch.Tensor, mask: torch.Tensor | None, **options: Any
    ) -> torch.Tensor:
        out = super().attend(handle, query, mask, **options)
        cache = self.cache
        first = cache.backend
        for other in cache.witnesses:
            cache.backend = other
            difference = super().attend(handle, query, mask, **options).double() - out.double()
            squares = torch.stack([difference.square().sum(), out.double().square().sum()])
            cache.squares.setdefault(other, {}).setdefault(self.index, []).append(squares)
        cache.backend = first
        return out


class _SharedCache(TQ4Cache):
    """A cache that backends take turns on; each attention call also goes to ``witnesses``."""

    layer_class = _SharedLayer

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.witnesses: tuple[str, ...] = ()
        self.squares: dict[str, dict[int, list[torch.Tensor]]] = {}
        super().__init__(*arguments, **options)

    def errors(self, backend: str) -> list[float]:
        """Relative error of a witness, of each layer."""
        layers = self.squares.get(backend, {})
        sums = (torch.stack(calls).sum(0).tolist() for _, calls in sorted(layers.items()))
        return [math.sqrt(wrong / whole) if whole else 0.0 for wrong, whole in sums]


def steps(backends: list[str], tokens: int) -> int:
    """How often :func:`compare` reports progress."""
    return len(backends) * (2 * tokens + 1) if len(backends) > 1 else 0


def compare(
    model: PreTrainedModel,
    prompts: torch.Tensor,
    text: torch.Tensor,
    backends: list[str],
    options: dict[str, Any],
    advance: Callable[[str], None],
) -> Agreement | None:
    """Agreement of backends on a text; None if there is one backend or none.

    Args:
        model: in float16 or bfloat16; its attention becomes "tq4".
        prompts: ids ``[B, P]``, P at least 2, without padding.
        text: ids ``[B, G]`` that follow the prompts.
        backends: names; the first one stores the cache that all read.
        options: of the :class:`~tq4.integrations.transformers.TQ4Cache`.
        advance: called with a title, "phase, backend", before each of :func:`steps` steps.

    Raises:
        ValueError: a prompt of one token.
    """
    if len(backends) < 2:
        return None
    if prompts.shape[1] < 2:
        raise ValueError("prompts: expected at least 2 tokens to compare backends")
    model.set_attn_implementation("tq4")
    # The prompt's last token is decoded too: its choice is the first token of the text.
    start, fed = prompts[:, :-1], torch.cat([prompts[:, -1:], text[:, :-1]], 1)
    result = Agreement(list(backends), text.numel())
    choices = {}
    for name in backends:
        advance(f"own caches, {name}")
        cache = TQ4Cache(model, backend=name, **options)
        _choose(model, cache, start)
        chosen = []
        for token in fed.split(1, 1):
            advance(f"own caches, {name}")
            chosen.append(_choose(model, cache, token))
        choices[name] = torch.stack(chosen, 1)
        result.with_text[name] = _share(choices[name], text)
    result.own_caches = _pairs(choices)
    cache = _SharedCache(model, backend=backends[0], **options)
    _choose(model, cache, start)
    cache.activate_past_recording()  # of sliding layers, whose window forgets what a crop brings back
    if cache.is_croppable:
        result.one_cache = _pairs(_take_turns(model, cache, fed, backends, advance))
        result.attention_error = {name: cache.errors(name) for name in backends[1:]}
    return result


def _take_turns(
    model: PreTrainedModel,
    cache: _SharedCache,
    fed: torch.Tensor,
    backends: list[str],
    advance: Callable[[str], None],
) -> dict[str, torch.Tensor]:
    """Choices ``[B, G]`` of each backend over what the first one has stored."""
    first, *others = backends
    chosen: dict[str, list[torch.Tensor]] = {name: [] for name in backends}
    for step, token in enumerate(fed.split(1, 1)):
        for name in others:
            advance(f"one cache, {name}")
            cache.backend = name
            chosen[name].append(_choose(model, cache, token))
            cache.crop(-1)
        # The first one last: it overwrites what the others stored for this token.
        advance(f"one cache, {first}")
        cache.backend = first
        cache.witnesses = tuple(others) if step % _ATTENTION_EVERY == 0 else ()
        chosen[first].append(_choose(model, cache, token))
        cache.witnesses = ()
        cache.crop(0)  # lets go of what was recorded
    return {name: torch.stack(tokens, 1) for name, tokens in chosen.items()}


def _choose(model: PreTrainedModel, cache: TQ4Cache, ids: torch.Tensor) -> torch.Tensor:
    """Most likely tokens ``[B]`` after ids ``[B, T]``."""
    options = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    return model(ids, past_key_values=cache, use_cache=True, **options).logits[:, -1].argmax(-1)


def _pairs(choices: dict[str, torch.Tensor]) -> dict[str, float]:
    return {f"{a}, {b}": _share(choices[a], choices[b]) for a, b in itertools.combinations(choices, 2)}


def _share(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a == b).double().mean())
