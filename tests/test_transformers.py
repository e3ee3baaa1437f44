"""TQ4Cache and the attention function "tq4" on tiny random models, against dense attention over what the
cache decodes to.

Two comparisons.  *Each call*: a probe around the attention function decodes the pages and repeats every call
densely in float64, with masks worked out independently; tight.  *The whole model*: logits against the
library's own cache holding K and V that went through the codec (:class:`RoundTripCache`); less tight, because
a rounding error upstream moves some codes downstream, but nothing is shared with the code under test except
the codec.
"""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch

import tq4

pytest.importorskip("transformers", "5.17", reason="transformers >= 5.17 is not installed")

from transformers import AttentionInterface, BloomConfig, BloomForCausalLM  # noqa: E402
from transformers.cache_utils import DynamicCache  # noqa: E402

from support_transformers import (  # noqa: E402
    ARCHITECTURES,
    VOCABULARY,
    RoundTripCache,
    feed,
    left_padded,
    relative,
    tiny_model,
    tokens,
)
from tq4.integrations import transformers as integration  # noqa: E402
from tq4.integrations.folding import folded  # noqa: E402
from tq4.integrations.transformers import CompressedKV, TQ4Cache, TQ4Layer, fold_rotation  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
#: Relative error of the worst row of all calls, without and with the INT8 recipe; a mistake is an error of 1.
CALL_BOUND = {False: 1e-2, True: 4e-2}
#: Relative error of logits against the round-trip cache; TQ4 itself moves them by 0.06 to 0.15.
LOGITS_BOUND = 0.08


# ---- Each call against dense attention over the pages.


class Probe:
    """Repeats every call of the attention function densely over the decoded pages."""

    def __init__(self, mask: torch.Tensor | None) -> None:
        self.mask = mask
        self.calls = 0
        self.worst = 0.0

    def __call__(
        self, module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
    ) -> Any:
        out, weights = integration.attention(module, query, key, value, attention_mask, **kwargs)
        assert weights is None and out.is_contiguous()
        if isinstance(key, CompressedKV):
            assert key is value
            self.check(module, key, query, out, kwargs)
        return out, weights

    def check(self, module: Any, key: CompressedKV, query: Any, out: Any, kwargs: dict[str, Any]) -> None:
        layer, columns, fresh = key.layer, key.shape[2], query.shape[2]
        batch = query.shape[0]
        mask = torch.ones(batch, columns) if self.mask is None else self.mask[:, :columns].cpu()
        counts = mask.sum(1).int()
        table = layer.cache.paging.table.to(query.device)
        k, v = tq4.gather(
            layer.pool,
            table,
            counts.to(query.device),
            layer.quantizer,
            dtype=torch.float32,
            rotate_v=not folded(module),
        )
        start = 0
        for row, count in enumerate(counts.tolist()):
            kept = mask[row].nonzero()[:, 0]
            queries = [
                (int(c) - (columns - fresh), rank + 1) for rank, c in enumerate(kept) if c >= columns - fresh
            ]
            keys, values = k[start : start + count].double(), v[start : start + count].double()
            start += count
            for position, visible in queries:
                expected = self.dense(
                    query[row, :, position].double(), keys[:visible], values[:visible], kwargs
                )
                error = relative(out[row, position].double(), expected)
                self.worst = max(self.worst, error)
                self.calls += 1

    @staticmethod
    def dense(q: Any, keys: Any, values: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        group = q.shape[0] // keys.shape[1]
        keys = keys.repeat_interleave(group, 1)
        values = values.repeat_interleave(group, 1)
        scores = torch.einsum("hd,lhd->hl", q, keys) * kwargs["scaling"]
        if kwargs.get("softcap"):
            scores = kwargs["softcap"] * torch.tanh(scores / kwargs["softcap"])
        if kwargs.get("s_aux") is not None:
            scores = torch.cat([scores, kwargs["s_aux"].double()[:, None]], 1)
        weights = scores.softmax(1)[:, : keys.shape[0]]
        return torch.einsum("hl,lhd->hd", weights, values)


@pytest.fixture
def probe():
    """Installs a Probe for a mask as the attention function "tq4"."""

    def install(mask: torch.Tensor | None) -> Probe:
        wrapper = Probe(mask)
        AttentionInterface.register("tq4", wrapper)
        return wrapper

    yield install
    AttentionInterface.register("tq4", integration.attention)


def _masks(kind: str) -> torch.Tensor | None:
    """[3, 37]: no mask, or padding on the left, on the right, or anywhere, of 0, 5 and 30 tokens."""
    if kind == "none":
        return None
    padding = torch.tensor([0, 5, 30])[:, None]
    column = torch.arange(37)
    if kind == "left":
        return (column >= padding).long()
    if kind == "right":  # then two tokens for every sequence
        return ((column < 35 - padding) | (column >= 35)).long()
    generator = torch.Generator().manual_seed(3)
    mask = (torch.rand(3, 37, generator=generator) < 0.6).long()
    mask[:, -1] = 1
    return mask


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_call_is_attention_over_the_pages(probe, name, kind, device):
    model = tiny_model(name, device=device)
    mask = _masks(kind)
    mask = None if mask is None else mask.to(device)
    int8 = kind != "holes"
    check = probe(mask)
    cache = TQ4Cache(model.config, int8=int8)
    feed(model, cache, tokens(3, 37, device), mask, [20, 1, 14, 1, 1], "tq4")
    layers = len(cache.tq4_layers)
    assert check.calls == layers * (3 * 37 if mask is None else int(mask.sum()))
    assert check.worst < CALL_BOUND[int8]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [
        {"layout": "head_major", "page_size": 32},
        {"rotation": "haar", "norm_correction": True, "max_length": 64},
        {"dense_first": 1, "dense_last": 1},
        {"backend": "reference", "seed": 7},
    ],
)
def test_options(probe, options, device):
    model = tiny_model("llama", torch.bfloat16, device)
    mask = _masks("left").to(device)
    check = probe(mask)
    cache = TQ4Cache(model, **options)
    logits = feed(model, cache, tokens(3, 37, device), mask, [30, 1, 6], "tq4")
    dense = options.get("dense_first", 0) + options.get("dense_last", 0)
    assert [isinstance(layer, TQ4Layer) for layer in cache.layers] == (
        [True] * 4 if not dense else [False, True, True, False]
    )
    assert check.calls == (4 - dense) * int(mask.sum())
    assert check.worst < CALL_BOUND[True]
    same = RoundTripCache(
        model.config,
        norm_correction=options.get("norm_correction", False),
        rotation=options.get("rotation", "hadamard"),
        dense=(0, 3) if dense else (),
    )
    expected = feed(model, same, tokens(3, 37, device), mask, [30, 1, 6], "eager")
    if "seed" not in options:
        assert relative(logits[mask > 0], expected[mask > 0]) < 2 * LOGITS_BOUND


@pytest.mark.parametrize("backend", [pytest.param(b, marks=pytest.mark.gpu) for b in ("cuda", "triton")])
def test_every_backend(probe, backend):
    model = tiny_model("gpt_oss", torch.bfloat16, "cuda")
    ok, reason = tq4.available_backends()[backend]
    if not ok:
        pytest.skip(reason)
    check = probe(None)
    feed(model, TQ4Cache(model, backend=backend), tokens(2, 150, "cuda"), None, [140, 1, 8, 1], "tq4")
    assert check.calls and check.worst < CALL_BOUND[True]


# ---- The whole model.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_logits_are_those_of_the_decompressed_cache(name, device):
    model = tiny_model(name, device=device)
    ids, mask = left_padded([33, 9, 21], device)
    chunks = [16, 8, 1, 1, 7]
    actual = feed(model, TQ4Cache(model.config, int8=False), ids, mask, chunks, "tq4")
    expected = feed(model, RoundTripCache(model.config), ids, mask, chunks, "eager")
    plain = feed(model, DynamicCache(config=model.config), ids, mask, chunks, "eager")
    seen = mask > 0
    effect = relative(expected[seen], plain[seen])
    assert relative(actual[seen], expected[seen]) < min(LOGITS_BOUND, effect / 2)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_without_a_tq4_cache_it_is_dense_attention(name):
    model = tiny_model(name)
    ids, mask = left_padded([40, 9, 23])
    chunks = [21, 11, 1, 7]
    for cache in (lambda: None, lambda: DynamicCache(config=model.config)):
        parts = [40] if cache() is None else chunks
        actual = feed(model, cache(), ids, mask, parts, "tq4")
        expected = feed(model, cache(), ids, mask, parts, "eager")
        assert relative(actual[mask > 0], expected[mask > 0]) < 5e-3
        unpadded = feed(model, cache(), ids, None, parts, "tq4")
        expected = feed(model, cache(), ids, None, parts, "eager")
        assert relative(unpadded, expected) < 5e-3


def test_padding_changes_nothing():
    """A sequence padded in a batch has the cache bytes and logits that it has alone."""
    model = tiny_model("llama")
    ids, mask = left_padded([30, 7])
    together = TQ4Cache(model.config)
    logits = feed(model, together, ids, mask, [20, 9, 1], "tq4")[1, -7:]
    alone = TQ4Cache(model.config)
    expected = feed(model, alone, ids[1:, -7:], None, [6, 1], "tq4")[0]
    assert relative(logits, expected) < 2e-2
    first, second = together.layers[0], alone.layers[0]
    length = torch.tensor([7], dtype=torch.int32)
    batched, single = (
        tq4.gather(layer.pool, layer.cache.paging.table[-1:], length, layer.quantizer)
        for layer in (first, second)
    )
    for a, b in zip(batched, single, strict=True):
        assert relative(a.float(), b.float()) < 1e-2


def test_first_chunk_dense():
    """The first chunk's logits are exact; later ones are those of the compressed cache."""
    model = tiny_model("llama")
    ids, mask = left_padded([24, 5])
    seen = mask > 0
    exact = feed(model, None, ids[:, :16], mask[:, :16], [16], "eager")
    dense = feed(model, TQ4Cache(model, first_chunk="dense"), ids, mask, [16, 8], "tq4")
    compressed = feed(model, TQ4Cache(model), ids, mask, [16, 8], "tq4")
    early, late = seen[:, :16], seen[:, 16:]
    assert relative(dense[:, :16][early], exact[early]) < 5e-3
    assert relative(compressed[:, :16][early], exact[early]) > 2e-2
    assert relative(dense[:, 16:][late], compressed[:, 16:][late]) < 0.2


def test_chunks_do_not_change_the_answer():
    model = tiny_model("qwen3")
    ids = tokens(2, 40)
    whole = feed(model, TQ4Cache(model), ids, None, [40], "tq4")
    pieces = feed(model, TQ4Cache(model), ids, None, [17, 16, 1, 6], "tq4")
    assert relative(pieces, whole) < LOGITS_BOUND


def test_a_static_cache_is_dense_attention_too():
    from transformers.cache_utils import StaticCache

    model = tiny_model("llama")
    ids, mask = left_padded([20, 9])
    logits = [
        feed(model, StaticCache(config=model.config, max_cache_len=24), ids, mask, [12, 1, 7], kind)
        for kind in ("tq4", "sdpa")
    ]
    assert relative(logits[0][mask > 0], logits[1][mask > 0]) < 5e-3


# ---- Rearranging.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_reorder_crop_repeat_and_select(name, padded, device):
    """Random rearrangements between steps, the same on the round-trip cache: any mistake is an error of 1."""
    model = tiny_model(name, device=device)
    ids, mask = left_padded([19, 12], device)
    mask = mask if padded else torch.ones_like(mask)
    ours, theirs = TQ4Cache(model.config, int8=False, page_size=16), RoundTripCache(model.config)
    for cache in (ours, theirs):
        cache.activate_past_recording()
    actions = [
        ("repeat", 2),
        ("reorder", [1, 1, 2, 2]),
        ("feed", 1),
        ("reorder", [3, 0, 0, 3]),
        ("feed", 3),
        ("crop", -2),
        ("feed", 15),
        ("reorder", [2, 2, 2, 1]),
        ("crop", -9),
        ("feed", 1),
        ("select", [1, 3]),
        ("feed", 5),
        ("crop", -4),
        ("feed", 4),
    ]
    rows = torch.arange(2, device=device)
    feed_pair = [(ours, "tq4"), (theirs, "eager")]
    logits = [_step(model, cache, kind, ids, mask) for cache, kind in feed_pair]
    assert relative(logits[0][:, -1], logits[1][:, -1]) < LOGITS_BOUND
    for count, (action, value) in enumerate(actions):
        if action == "feed":
            fresh = tokens(mask.shape[0], value, device, seed=count)
            mask = torch.cat([mask, torch.ones_like(fresh)], 1)
            for cache, _ in feed_pair:
                cache.crop(0)  # sliding layers that record their past are cut to the window so
            a, b = (_step(model, cache, kind, fresh, mask) for cache, kind in feed_pair)
            assert relative(a, b) < LOGITS_BOUND, (count, action)
            continue
        if action == "crop":
            mask = mask[:, : mask.shape[1] + value]
        else:
            index = rows[: mask.shape[0]].repeat_interleave(2) if action == "repeat" else None
            index = torch.tensor(value, device=device) if index is None else index
            mask = mask[index]
            rows = torch.arange(8, device=device)
        for cache, _ in feed_pair:
            if action == "crop":
                cache.crop(value)
            elif action == "repeat":
                cache.batch_repeat_interleave(value)
            elif action == "select":
                cache.batch_select_indices(index)
            else:
                cache.reorder_cache(index)
        assert ours.get_seq_length() == theirs.get_seq_length() == mask.shape[1]
    table = ours.paging.table
    assert int(table.max()) < ours.paging.num_blocks
    used = set(table.flatten().tolist())
    assert used.isdisjoint(ours.paging._free.tolist())
    assert len(used) + ours.paging._free.numel() == ours.paging.num_blocks


def _step(model: Any, cache: Any, kind: str, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    model.set_attn_implementation(kind)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    return out.logits.float()


def test_beams_share_pages():
    model = tiny_model("llama")
    cache = TQ4Cache(model.config, max_length=100)
    feed(model, cache, tokens(1, 70), None, [70], "tq4")
    before = cache.nbytes
    cache.batch_repeat_interleave(4)
    filled = cache.paging.table[:, : 70 // 16]
    assert (filled == filled[0]).all()
    rest = cache.paging.table[:, 70 // 16 :].flatten().tolist()
    assert len(set(rest)) == len(rest)
    model.set_attn_implementation("tq4")
    with torch.no_grad():
        out = model(tokens(4, 1), past_key_values=cache).logits
    assert out.isfinite().all()
    assert cache.nbytes < 3 * before


def test_pages_are_added_as_needed():
    model = tiny_model("llama")
    cache, fixed = TQ4Cache(model.config), TQ4Cache(model.config, max_length=400)
    ids = tokens(1, 400)
    sizes, chunks = set(), [10, 5, 300, 1, 84]
    start, parts = 0, []
    model.set_attn_implementation("tq4")
    with torch.no_grad():
        for length in chunks:
            piece = ids[:, start : start + length]
            parts.append(model(piece, past_key_values=cache).logits.float())
            sizes.add(cache.nbytes)
            start += length
    expected = feed(model, fixed, ids, None, chunks, "tq4")
    assert relative(torch.cat(parts, 1), expected) < 1e-6
    assert len(sizes) > 1
    assert fixed.nbytes == 4 * 25 * 16 * tq4.layout.token_bytes(2, 64)


# ---- generate.


def _generate(model: Any, cache: Any, attention: str, **options: Any) -> Any:
    model.set_attn_implementation(attention)
    defaults = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    return model.generate(past_key_values=cache, **{**defaults, **options})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_generate_greedy_padded_batch(dtype, device):
    model = tiny_model("llama", dtype, device)
    ids, mask = left_padded([18, 7, 11], device)
    out = _generate(model, TQ4Cache(model), "tq4", input_ids=ids, attention_mask=mask)
    assert out.shape == (3, 30)
    # Each token is the best, or as good as the best, by the logits of the round-trip cache on the same
    # tokens.
    full = torch.cat([mask, torch.ones_like(out[:, 18:])], 1)
    logits = feed(model, RoundTripCache(model.config), out, full, [18] + [1] * 12, "eager")[:, 17:-1]
    chosen = logits.gather(2, out[:, 18:, None])[..., 0]
    slack = {torch.float16: 0.15, torch.bfloat16: 0.6}[dtype] * logits.std()
    assert (logits.amax(-1) - chosen < slack).all()


@pytest.mark.parametrize("device", DEVICES)
def test_generate_in_chunks_and_with_lookup_is_greedy(device):
    model = tiny_model("qwen3", device=device)
    ids = tokens(1, 6, device).repeat(1, 5)
    greedy = _generate(model, TQ4Cache(model), "tq4", input_ids=ids)
    chunked = _generate(model, TQ4Cache(model), "tq4", input_ids=ids, prefill_chunk_size=8)
    cache = TQ4Cache(model)
    lookup = _generate(model, cache, "tq4", input_ids=ids, prompt_lookup_num_tokens=4)
    assistant = _generate(
        model, TQ4Cache(model), "tq4", input_ids=ids, assistant_model=tiny_model("qwen3", device=device)
    )
    for other in (chunked, lookup, assistant):
        assert (other == greedy).float().mean() > 0.9  # a near tie may be decided otherwise
        assert other.shape == greedy.shape
    assert cache.get_seq_length() == cache.paging.length < lookup.shape[1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_generate_beams(name, device):
    model = tiny_model(name, device=device)
    ids, mask = left_padded([20, 9], device)
    options = {
        "input_ids": ids,
        "attention_mask": mask,
        "num_beams": 3,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    ours = _generate(model, TQ4Cache(model, int8=False), "tq4", **options)
    theirs = _generate(model, RoundTripCache(model.config), "eager", **options)
    assert ours.sequences.shape == theirs.sequences.shape
    assert (ours.sequences_scores - theirs.sequences_scores).abs().max() < 0.02


def test_generate_samples():
    model = tiny_model("llama")
    out = _generate(
        model, TQ4Cache(model), "tq4", input_ids=tokens(2, 9), do_sample=True, num_return_sequences=2, top_k=5
    )
    assert out.shape == (4, 21) and int(out.max()) < VOCABULARY


def test_reset_and_reuse():
    model = tiny_model("gemma2")
    cache = TQ4Cache(model)
    first = _generate(model, cache, "tq4", input_ids=tokens(2, 20))
    size = cache.nbytes
    cache.reset()
    assert cache.get_seq_length() == 0
    again = _generate(model, cache, "tq4", input_ids=tokens(2, 20))
    assert (first == again).all() and cache.nbytes == size
    cache.reset()
    other = _generate(model, cache, "tq4", input_ids=tokens(1, 9, seed=4))
    fresh = _generate(model, TQ4Cache(model), "tq4", input_ids=tokens(1, 9, seed=4))
    assert (other == fresh).all()


def test_a_conversation_continues():
    """A second generate with the same cache and a longer prompt only adds to the cache."""
    model = tiny_model("llama")
    cache = TQ4Cache(model)
    turn = _generate(model, cache, "tq4", input_ids=tokens(1, 14))
    held = cache.get_seq_length()
    prompt = torch.cat([turn, tokens(1, 5, seed=8)], 1)
    continued = _generate(model, cache, "tq4", input_ids=prompt)
    assert cache.get_seq_length() == held + 1 + 5 + 11
    anew = _generate(model, TQ4Cache(model), "tq4", input_ids=prompt)
    assert (continued == anew).float().mean() > 0.9


@pytest.mark.gpu
def test_a_decoding_step_does_not_wait_for_the_gpu():
    model = tiny_model("llama", torch.float16, "cuda")
    cache = TQ4Cache(model)
    model.set_attn_implementation("tq4")
    ids, mask = left_padded([40, 13], "cuda")
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        step = tokens(2, 1, "cuda")
        positions = torch.tensor([[40], [13]], device="cuda")
        for i in range(4):
            mask = torch.cat([mask, torch.ones_like(step)], 1)
            torch.cuda.set_sync_debug_mode("error" if i else "default")
            try:
                model(step, attention_mask=mask, position_ids=positions + i, past_key_values=cache)
            finally:
                torch.cuda.set_sync_debug_mode("default")


# ---- Folding.


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_folding_changes_no_logits(name, probe):
    model = tiny_model(name, torch.bfloat16)
    ids = tokens(2, 20)
    before = feed(model, None, ids, None, [20], "eager")
    compressed = feed(model, TQ4Cache(model), ids, None, [12, 1, 7], "tq4")
    assert fold_rotation(model) == 4
    assert relative(feed(model, None, ids, None, [20], "eager"), before) < 2e-2
    check = probe(None)
    after = feed(model, TQ4Cache(model), ids, None, [12, 1, 7], "tq4")
    assert check.calls and check.worst < CALL_BOUND[True]
    assert relative(after, compressed) < 2 * LOGITS_BOUND


def test_folding_with_a_bias():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = tiny_model("llama").config.to_dict() | {"attention_bias": True}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.v_proj.bias)
    before = feed(model, None, tokens(1, 9), None, [9], "eager")
    fold_rotation(model, "haar", seed=3)
    assert relative(feed(model, None, tokens(1, 9), None, [9], "eager"), before) < 1e-5


def test_folding_refuses_and_restores():
    model = tiny_model("llama", torch.float32)
    attention = model.model.layers[1].self_attn

    class Gate(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * torch.linspace(-1, 1, x.shape[-1]))

    gated = Gate(attention.o_proj.in_features, attention.o_proj.out_features, bias=False)
    gated.weight = attention.o_proj.weight
    attention.o_proj = gated
    before = feed(model, None, tokens(1, 9), None, [9], "eager")
    with pytest.raises(ValueError, match="model: its logits change"):
        fold_rotation(model)
    assert torch.equal(feed(model, None, tokens(1, 9), None, [9], "eager"), before)
    model = tiny_model("llama")
    fold_rotation(model)
    with pytest.raises(ValueError, match="model: the rotation is folded"):
        fold_rotation(model)
    with pytest.raises(ValueError, match="model: found no attention"):
        fold_rotation(torch.nn.Linear(2, 2))


# ---- What is refused.


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"bits": 3}, "bits"),
        ({"offloading": True}, "offloading"),
        ({"rotation": None}, "rotation"),
        ({"first_chunk": "exact"}, "first_chunk"),
        ({"max_length": 0}, "max_length"),
        ({"dense_first": -1}, "dense_first"),
        ({"dense_last": -1}, "dense_last"),
        ({"page_size": 8}, "block_size"),
        ({"layout": "diagonal"}, "layout"),
    ],
)
def test_bad_options(options, name):
    with pytest.raises(ValueError, match=name):
        TQ4Cache(tiny_model("llama").config, **options)


def test_models_that_cannot_work():
    with pytest.raises(TypeError, match="config"):
        TQ4Cache("llama")
    bloom = BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=64, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match="AttentionInterface"):
        TQ4Cache(bloom)
    with pytest.raises(ValueError, match="ALiBi"):
        TQ4Cache(bloom.config)
    model = tiny_model("llama", torch.float32)
    model.set_attn_implementation("tq4")
    with torch.no_grad(), pytest.raises(TypeError, match="float16 or bfloat16"):
        model(tokens(1, 3), past_key_values=TQ4Cache(model))
    key = torch.zeros(1, 1, 3, 80, dtype=torch.float16)
    with pytest.raises(ValueError, match="head_dim of 64"):
        TQ4Cache(model.config).update(key, key, 0)
    with pytest.raises(ValueError, match="same head_dim"):
        TQ4Cache(model.config).update(key, key[..., :64], 0)


def test_another_attention_function_is_told():
    model = tiny_model("llama")
    for other in ("sdpa", "eager"):
        model.set_attn_implementation(other)
        cache = TQ4Cache(model)
        with torch.no_grad(), pytest.raises(RuntimeError, match='set_attn_implementation\\("tq4"\\)'):
            model(tokens(1, 3), past_key_values=cache)
    with pytest.raises(RuntimeError, match="never reached"):
        cache.update(torch.zeros(1, 2, 1, 64), torch.zeros(1, 2, 1, 64), 0)
    with pytest.raises(RuntimeError, match="never reached"):
        cache.crop(-1)


def test_options_of_a_call_that_are_refused():
    model = tiny_model("llama")
    model.set_attn_implementation("tq4")
    ids = tokens(1, 6)
    no_grad = torch.no_grad()
    with no_grad, pytest.raises(ValueError, match="output_attentions"):
        model(ids, past_key_values=TQ4Cache(model), output_attentions=True)
    with no_grad, pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="training"):
        model(ids, past_key_values=TQ4Cache(model))
    custom = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    with no_grad, pytest.raises(ValueError, match="attention_mask.*custom"):
        model(ids, attention_mask=custom, past_key_values=TQ4Cache(model))
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model.train()
    with no_grad, pytest.raises(ValueError, match="attention_dropout"):
        model(ids, past_key_values=TQ4Cache(model))
    module, query = model.model.layers[0].self_attn, torch.zeros(1, 4, 2, 64)
    for name in ("position_bias", "head_mask", "cu_seq_lens_q"):
        with pytest.raises(ValueError, match=name):
            integration.attention(module, query, query, query, None, **{name: query})


def test_a_cache_that_does_not_fit_the_call():
    model = tiny_model("llama")
    model.set_attn_implementation("tq4")
    ids, mask = left_padded([10, 6])
    with torch.no_grad():
        cache = TQ4Cache(model, max_length=12)
        model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match="past_key_values.*2 sequences"):
            model(ids[:1], past_key_values=cache)
        with pytest.raises(ValueError, match="max_length"):
            model(ids, past_key_values=cache)
        cache.reset()
        model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match="attention_mask.*gone"):
            model(ids[:, :1], past_key_values=cache)
        cache.reset()
        model(ids, attention_mask=mask, past_key_values=cache)
        changed = torch.ones(2, 11, dtype=torch.long)
        with pytest.raises(ValueError, match="attention_mask.*changed"):
            model(ids[:, :1], attention_mask=changed, past_key_values=cache)
        cache.reset()
        key = torch.zeros(2, 2, 3, 64, dtype=torch.float16)
        cache.update(key, key, 0)
        with pytest.raises(RuntimeError, match="layer 1"):
            cache.update(key[:, :, :2], key[:, :, :2], 1)
    for name, value in (("crop", -1), ("reorder_cache", ids), ("batch_repeat_interleave", 2)):
        with pytest.raises(RuntimeError, match=name):
            getattr(cache.layers[0], name)(value)
    with pytest.raises(ValueError, match="offloading"):
        cache.offload(0)
    with pytest.raises(ValueError, match="offloading"):
        cache.layers[0].prefetch()


# ---- The package.


def test_importing_tq4_does_not_import_transformers():
    code = "import sys, tq4, tq4.cli; assert 'transformers' not in sys.modules"
    path = [p for p in sys.path if p]
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {code}"], check=True)


def test_scale_defaults_to_the_head_dim():
    module = torch.nn.Module()
    q, k, v = torch.randn(3, 1, 2, 5, 64).unbind(0)
    out, _ = integration.attention(module, q, k, v, None)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=1 / math.sqrt(64)
    )
    assert torch.allclose(out.transpose(1, 2), expected, atol=1e-5)
