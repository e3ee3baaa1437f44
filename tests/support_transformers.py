"""Tiny random language models of four architectures, and the cache that a TQ4 cache is compared with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import DynamicCache, DynamicLayer

import tq4

VOCABULARY = 96
WINDOW = 8

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    # Wide weights: random narrow ones give nearly equal logits, and a tie decides what is generated.
    "initializer_range": 0.1,
}
_SLIDING = ["sliding_attention", "full_attention"] * 2

ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_COMMON)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **_COMMON,
            layer_types=_SLIDING,
            sliding_window=WINDOW,
            attn_logit_softcapping=5.0,
            query_pre_attn_scalar=48,
        )
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_COMMON)),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            **_COMMON,
            layer_types=_SLIDING,
            sliding_window=WINDOW,
            num_local_experts=2,
            num_experts_per_tok=2,  # all of them: no routing decision for a rounding error to turn
        )
    ),
}


def tiny_model(name: str, dtype: torch.dtype = torch.float16, device: str = "cpu") -> PreTrainedModel:
    """A model of an architecture with random weights, the same each time."""
    state = torch.random.get_rng_state()
    torch.manual_seed(5)
    model = ARCHITECTURES[name]()
    torch.random.set_rng_state(state)
    return model.to(device, dtype).eval()


def tokens(batch: int, length: int, device: str = "cpu", seed: int = 1) -> torch.Tensor:
    """Random token ids [batch, length] without the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator).to(device)


def left_padded(lengths: list[int], device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [batch, max(lengths)] with padding on the left."""
    longest = max(lengths)
    ids = tokens(len(lengths), longest)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return (ids * mask).to(device), mask.long().to(device)


class _RoundTripLayer(DynamicLayer):
    """A dense layer whose K and V have been through the TQ4 codec."""

    def __init__(self, owner: RoundTripCache) -> None:
        super().__init__()
        self.owner = owner

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        coded = (self.owner.coded(key_states, "k"), self.owner.coded(value_states, "v"))
        return super().update(*coded)


class RoundTripCache(DynamicCache):
    """The library's own cache with every K and V of full-attention layers replaced by what TQ4 makes of "
    "it."""

    def __init__(
        self,
        config: Any,
        *,
        norm_correction: bool = False,
        rotation: str = "hadamard",
        dense: tuple[int, ...] = (),
    ) -> None:
        super().__init__(config=config)
        self.quantizer_options = {"norm_correction": norm_correction, "rotation": rotation}
        self.layers = [
            _RoundTripLayer(self) if type(layer) is DynamicLayer and i not in dense else layer
            for i, layer in enumerate(self.layers)
        ]

    def coded(self, x: torch.Tensor, which: str) -> torch.Tensor:
        quantizer = tq4.Quantizer(x.shape[-1], device=x.device, **self.quantizer_options)
        flat = x.transpose(1, 2).flatten(0, 1)
        decoded = tq4.decompress(
            *tq4.compress(flat, quantizer, which=which), quantizer, which=which, dtype=x.dtype
        )
        return decoded.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def feed(
    model: PreTrainedModel,
    cache: Any,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    chunks: list[int],
    attention: str,
) -> torch.Tensor:
    """Logits [batch, length, vocabulary] of feeding ids in chunks of given lengths, teacher-forced."""
    model.set_attn_implementation(attention)
    positions = None
    if mask is not None:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
    parts, start = [], 0
    with torch.no_grad():
        for length in chunks:
            stop = start + length
            parts.append(
                model(
                    ids[:, start:stop],
                    attention_mask=None if mask is None else mask[:, :stop],
                    position_ids=None if positions is None else positions[:, start:stop],
                    past_key_values=cache,
                    use_cache=True,
                ).logits
            )
            start = stop
    assert start == ids.shape[1]
    return torch.cat(parts, 1).float()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error of logits."""
    return float((actual - expected).norm() / expected.norm())
