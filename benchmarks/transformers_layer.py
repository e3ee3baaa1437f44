"""One layer's attention and cache update inside a transformers model, and peak memory: dense against TQ4.

    python benchmarks/transformers_layer.py                      # 8K and 64K of context, batch 1 and 8
    python benchmarks/transformers_layer.py --context 8192 --batch 1 --layers 2 --hidden 1024

A Llama-3.1-8B-shaped model (32 / 8 heads, D = 128, hidden 4096; random weights, a few layers) prefills a
prompt in chunks and then decodes, under three caches: the library's own with torch's attention ("sdpa"), TQ4,
and TQ4 with the rotation of V folded into the weights.

"decode" is GPU time between events around ``Cache.update`` and the attention function, the part of a layer
that the cache decides, with the host kept ahead of the GPU; projections and MLP are the same for all.  "step"
is the wall-clock time of a whole decoding step of these layers, the host's work included.  Steps get the mask
that generate passes, except sdpa's where the GPU alone is timed: to look at the mask, as the library does for
it, waits for the GPU.  cuDNN's attention is switched off.

Writes ``benchmarks/results/<gpu>-transformers-layer.json`` with the keys of the other records.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import record
from tq4.integrations import transformers as integration
from tq4.integrations.report import environment
from tq4.integrations.transformers import TQ4Cache, fold_rotation

OP = "transformers-layer"
CHUNK = 4096
DECODE_STEPS, WARM_STEPS = 24, 8
#: GPU clock cycles of waiting before a timed step, about 10 ms.
AHEAD_CYCLES = 18_000_000
HQ, HKV, D = 32, 8, 128


class Timer:
    """CUDA events from the cache update to the end of attention, of one layer after the other."""

    def __init__(self) -> None:
        self.start: torch.cuda.Event | None = None
        self.spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def wrap_update(self, cache: Any) -> None:
        update = cache.update

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.start = torch.cuda.Event(enable_timing=True)
            self.start.record()
            return update(*args, **kwargs)

        cache.update = timed

    def wrap_attention(self, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            out = function(*args, **kwargs)
            if self.start is not None:
                end = torch.cuda.Event(enable_timing=True)
                end.record()
                self.spans.append((self.start, end))
                self.start = None
            return out

        return timed

    def take(self) -> list[float]:
        """Milliseconds of each span since the last call."""
        torch.cuda.synchronize()
        spans, self.spans = self.spans, []
        return [a.elapsed_time(b) for a, b in spans]


def build(layers: int, hidden: int, longest: int) -> LlamaForCausalLM:
    """The model; a small vocabulary, since logits are not what is measured."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=HQ,
        num_key_value_heads=HKV,
        head_dim=D,
        max_position_embeddings=longest,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_device("cpu")
    return model.to("cuda", torch.bfloat16).eval()


def measure(
    model: LlamaForCausalLM, impl: str, cache: Any, attention: str, batch: int, context: int, timer: Timer
) -> dict[str, Any]:
    """Prefill ``context`` tokens in chunks, then decode; times of a layer, peak memory beyond the weights.

    gbps counts the bytes of the cache that one layer holds.
    """
    model.set_attn_implementation(attention)
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    timer.wrap_update(cache)
    timer.take()
    generator = torch.Generator("cuda").manual_seed(1)
    ids = torch.randint(0, 1024, (batch, context), device="cuda", generator=generator)
    with torch.no_grad():
        start = time.perf_counter()
        for first in range(0, context, CHUNK):
            model(ids[:, first : first + CHUNK], past_key_values=cache, logits_to_keep=1)
        prefill = timer.take()
        prefill_s = time.perf_counter() - start
        total = context + WARM_STEPS + 2 * DECODE_STEPS
        mask = torch.ones(batch, total, dtype=torch.long, device="cuda")
        for step in range(WARM_STEPS + 2 * DECODE_STEPS):
            if step == WARM_STEPS:
                timer.take()
                start = time.perf_counter()
            if step == WARM_STEPS + DECODE_STEPS:
                timer.take()
                step_ms = 1e3 * (time.perf_counter() - start) / DECODE_STEPS
            if step >= WARM_STEPS + DECODE_STEPS:
                torch.cuda._sleep(AHEAD_CYCLES)  # the host fills the queue meanwhile
            alone = step >= WARM_STEPS + DECODE_STEPS and impl == "sdpa"
            seen = None if alone else mask[:, : context + step + 1]
            model(ids[:, step : step + 1], attention_mask=seen, past_key_values=cache)
        decode = timer.take()
    held = cache.nbytes if isinstance(cache, TQ4Cache) else _dense_bytes(cache)
    layers = model.config.num_hidden_layers
    # Every layer counts alike, the first of a step too, which works out slots and lengths for all.
    layer_ms = statistics.median(
        sum(decode[first : first + layers]) / layers for first in range(0, len(decode), layers)
    )
    return {
        "op": OP,
        "impl": impl,
        "hq": HQ,
        "hkv": HKV,
        "d": D,
        "dtype": "bfloat16",
        "batch": batch,
        "q_len": 1,
        "kv_len": context,
        "page": getattr(cache, "page_size", 0),
        "ms": layer_ms,
        "gbps": held / layers / layer_ms / 1e6,
        "step_ms": step_ms,
        "prefill_layer_ms": sum(prefill) / layers,
        "prefill_s": prefill_s,
        "peak_bytes": torch.cuda.max_memory_allocated() - weights,
        "cache_bytes": held,
        "layers": layers,
    }


def _dense_bytes(cache: DynamicCache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="one layer: cache update + attention; peak: memory beyond the weights")
    heads = "batch,context,cache,decode us,vs sdpa,step ms,prefill ms,cache MiB,peak MiB"
    for head in heads.split(","):
        table.add_column(head, justify="left" if head == "cache" else "right")
    dense = {(r["batch"], r["kv_len"]): r for r in rows if r["impl"] == "sdpa"}
    for row in rows:
        base = dense.get((row["batch"], row["kv_len"]))
        table.add_row(
            str(row["batch"]),
            str(row["kv_len"]),
            row["impl"],
            f"{1e3 * row['ms']:.1f}",
            f"{base['ms'] / row['ms']:.2f}x" if base else "",
            f"{row['step_ms']:.2f}",
            f"{row['prefill_layer_ms']:.1f}",
            f"{row['cache_bytes'] / 2**20:.0f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, nargs="+", default=[8192, 65536])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--page", type=int, default=16)
    parser.add_argument("--layout", default="token_major")
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("transformers_layer: needs a CUDA GPU")
    record.check_package_matches_tree()
    # cuDNN's attention plans anew for each length, about 10 ms of host time a layer and step: torch's other
    # kernels (FlashAttention-2 where there is no mask) are the fairer peer.
    torch.backends.cuda.enable_cudnn_sdp(False)
    model = build(args.layers, args.hidden, max(args.context) + 1024)
    timer = Timer()
    AttentionInterface.register("timed_sdpa", timer.wrap_attention(sdpa_attention_forward))
    AttentionMaskInterface.register("timed_sdpa", sdpa_mask)
    AttentionInterface.register("timed_tq4", timer.wrap_attention(integration.attention))
    AttentionMaskInterface.register("timed_tq4", integration.mask)

    def tq4_cache(context: int) -> TQ4Cache:
        length = context + WARM_STEPS + 2 * DECODE_STEPS
        return TQ4Cache(model, page_size=args.page, layout=args.layout, max_length=length)

    impls = [
        ("sdpa", "timed_sdpa", lambda context: DynamicCache(config=model.config)),
        ("tq4", "timed_tq4", tq4_cache),
        ("tq4, folded", "timed_tq4", tq4_cache),
    ]
    rows = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measure", total=len(impls) * len(args.context) * len(args.batch))
        # The smallest first, once more: it compiles and warms up.
        for impl, attention, make in impls:
            if impl == "tq4, folded":
                fold_rotation(model)
            measure(model, impl, make(512), attention, 1, 512, timer)
            for context in args.context:
                for batch in args.batch:
                    progress.update(task, description=f"{impl}, {batch} x {context}")
                    rows.append(measure(model, impl, make(context), attention, batch, context, timer))
                    progress.advance(task)
    rows.sort(key=lambda row: (row["kv_len"], row["batch"]))
    show(rows)
    if not args.no_record:
        print(record.write(OP, rows, environment("cuda")))


if __name__ == "__main__":
    main()
