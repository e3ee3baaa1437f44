"""The attention function "tq4" and its mask function, for transformers' attention interface.

With the keys and values of a :class:`~tq4.integrations.cache.TQ4Cache` it attends to the compressed pages.
With dense tensors (no cache, another cache, or a layer that a TQ4Cache keeps dense) it is torch's attention,
with the soft cap and the sinks that this lacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .cache import CompressedKV
from .folding import folded

NAME = "tq4"
#: Most bytes of fp32 scores that dense attention with a soft cap or sinks holds at a time.
_SCORE_BYTES = 512 << 20


def register() -> None:
    """Make "tq4" known to transformers; importing :mod:`tq4.integrations.transformers` does it."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask of a kind of layer, as the attention function wants it.

    A plain causal mask is the bool ``[B, columns]`` mask of padding, or None where there is none.  To find
    that out asks the device, so a decoding step (one token) keeps the mask.  Every other pattern (sliding
    layers, packed sequences, bidirectional blocks) becomes the 4-D mask of torch's attention, which only
    dense layers take.
    """
    aligned = kv_offset + kv_length == q_offset + q_length
    plain = mask_function is causal_mask_function and allow_is_causal_skip and local_size is None
    if plain and aligned and kv_offset == 0:
        if attention_mask is None or (q_length > 1 and bool(attention_mask.all())):
            return None
        return attention_mask
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        local_size,
        allow_is_causal_skip and aligned,
        **kwargs,
    )


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | CompressedKV,
    value: torch.Tensor | CompressedKV,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function "tq4".

    Args:
        module: the attention layer.
        query: ``[B, Hq, T, D]``.
        key, value: the :class:`CompressedKV` of a TQ4 layer, or dense ``[B, Hkv, L, D]``.
        attention_mask: what :func:`mask` returned.
        dropout, position_bias: refused.
        scaling: factor of the scores; default ``1 / sqrt(D)``.
        sliding_window: tokens that a query sees, its own included.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        s_aux: ``[Hq]`` sink logits.
        is_causal: default: the module's.

    Returns:
        ``([B, T, Hq, D], None)``.

    Raises:
        ValueError: an option that is not supported; the message names it.
    """
    _refuse_unsupported(module, dropout, position_bias, kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = 1.0 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    if s_aux is not None:
        s_aux = (s_aux.to_local() if hasattr(s_aux, "to_local") else s_aux).detach().float()
    if not isinstance(key, CompressedKV):
        out = dense_attention(
            query, key, value, attention_mask, scale, causal, sliding_window, softcap, s_aux
        )
        return out.transpose(1, 2).contiguous(), None
    if not causal:
        raise ValueError("is_causal: TQ4Cache supports causal attention only, got False")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            "attention_mask: TQ4Cache supports causal masks with padding ([B, tokens]), got a custom mask "
            f"{list(attention_mask.shape)}"
        )
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"query: TQ4Cache needs a model in float16 or bfloat16, got {query.dtype}")
    if module.training or (torch.is_grad_enabled() and query.requires_grad):
        raise ValueError(
            "training: attention over a TQ4Cache has no gradient; use model.eval() and torch.no_grad()"
        )
    layer = key.layer
    folded_v = folded(module)
    if layer.cache.first_chunk == "dense" and layer.store_only(key, attention_mask, folded_v):
        out = dense_attention(
            query, key.key, key.value, attention_mask, scale, causal, sliding_window, softcap, s_aux
        )
        return out.transpose(1, 2).contiguous(), None
    out = layer.attend(
        key,
        query,
        attention_mask,
        folded_v=folded_v,
        scale=scale,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out, None


def _refuse_unsupported(
    module: torch.nn.Module, dropout: float, position_bias: torch.Tensor | None, kwargs: dict[str, Any]
) -> None:
    if dropout:
        raise ValueError(f'attention_dropout: attn_implementation="tq4" supports 0, got {dropout}')
    if position_bias is not None:
        raise ValueError('position_bias: not supported by attn_implementation="tq4"')
    if kwargs.get("output_attentions") or getattr(
        getattr(module, "config", None), "output_attentions", False
    ):
        raise ValueError(
            'output_attentions: attn_implementation="tq4" never forms the attention weights; use "eager"'
        )
    for name in ("head_mask", "alibi", "cu_seq_lens_q", "cu_seq_lens_k"):
        if kwargs.get(name) is not None:
            raise ValueError(f'{name}: not supported by attn_implementation="tq4"')


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over dense K and V; query t of T sits at position L - T + t.

    Args:
        query: ``[B, Hq, T, D]``.
        key, value: ``[B, Hkv, L, D]``.
        mask: bool ``[B, >= L]`` of padding (the last L columns count), or ``[B, 1, T, L]`` bool or additive,
            which then is the whole mask; or None.
        scale: factor of the scores.
        causal: queries see keys up to their position.
        window: and this many tokens up to it.
        softcap: of the scores; None or 0 = none.
        sinks: fp32 ``[Hq]``, logits that join the denominator.

    Returns:
        ``[B, Hq, T, D]``; a query that sees nothing gets zeros.
    """
    tokens, length = query.shape[2], key.shape[2]
    group = query.shape[1] // key.shape[1]
    allowed = mask if mask is not None and mask.dim() == 4 else None
    whole = allowed is None and mask is None and (window is None or length <= window)
    if allowed is None and not whole:
        allowed = _allowed(mask, tokens, length, causal, window, query.device)
    if softcap or sinks is not None or (whole and causal and 1 < tokens != length):
        if allowed is None and causal and tokens > 1:
            allowed = _allowed(None, tokens, length, causal, window, query.device)
        return _by_scores(query, key, value, allowed, scale, softcap, sinks)
    if allowed is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=causal and tokens > 1, scale=scale, enable_gqa=group > 1
        )
    if tokens == 1 and allowed.shape[1] == 1:
        # The query heads of a KV head share keys and mask: they are as good as so many tokens.
        grouped = query.reshape(query.shape[0], key.shape[1], group, query.shape[3])
        allowed = allowed.expand(query.shape[0], 1, group, length)
        out = torch.nn.functional.scaled_dot_product_attention(
            grouped, key, value, attn_mask=allowed, scale=scale
        )
        return out.reshape(query.shape)
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scale)


def _allowed(
    mask: torch.Tensor | None,
    tokens: int,
    length: int,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> torch.Tensor:
    """bool ``[B or 1, 1, T, L]``: which keys each query sees."""
    rows = torch.arange(length - tokens, length, device=device)[:, None]
    columns = torch.arange(length, device=device)
    allowed = columns <= rows if causal else torch.ones_like(columns <= rows)
    if window is not None:
        allowed = allowed & (columns > rows - window)
    allowed = allowed[None, None]
    if mask is not None:
        allowed = allowed & mask[:, None, None, -length:]
    return allowed


def _by_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention by explicit fp32 scores, some query tokens at a time."""
    batch, heads, tokens, _ = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    group = heads // kv_heads
    out = torch.empty_like(query)
    rows = max(1, _SCORE_BYTES // (4 * batch * heads * length))
    for first in range(0, tokens, rows):
        part = slice(first, min(first + rows, tokens))
        q = query[:, :, part].unflatten(1, (kv_heads, group))
        scores = (q @ key[:, :, None].transpose(-1, -2)).float() * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if allowed is not None:
            seen = allowed[:, :, None, part]
            if seen.dtype == torch.bool:
                scores = scores.masked_fill(~seen, -math.inf)
            else:
                scores = scores + seen
        top = scores.amax(-1, keepdim=True)
        if sinks is not None:
            sink = sinks.view(1, kv_heads, group, 1, 1)
            top = torch.maximum(top, sink)
        top = top.masked_fill(top == -math.inf, 0.0)
        p = torch.exp(scores - top)
        total = p.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + torch.exp(sink - top)
        p = p / total.masked_fill(total == 0, 1.0)
        out[:, :, part] = (p.to(value.dtype) @ value[:, :, None]).flatten(1, 2)
    return out
