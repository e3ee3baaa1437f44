"""Tensor parallelism: each rank caches its own KV heads, and the answer is that of one process.

    torchrun --nproc-per-node 2 tests/tp_check.py             # NCCL where there are 2 GPUs, else gloo
    torchrun --nproc-per-node 2 tests/tp_check.py --model PATH --tokens 64

Rank 0 first runs the whole model alone; then all ranks run it with ``tp_plan="auto"``, on the same prompts (a
padded batch): greedily, and teacher-forced on rank 0's continuation.  Exits with 1 if the teacher-forced
logits differ by more than rounding, if fewer than 90 % of their argmaxes agree, or if a rank holds more than
its share of the cache.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

try:
    import tq4  # noqa: F401
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

from tq4.integrations.transformers import TQ4Cache

#: Relative error of logits between one process and several: sums in another order, and codes that this moves.
LOGITS_BOUND = 0.08
ARGMAX_BOUND = 0.9


def small_model(folder: Path) -> Path:
    """A random Llama with 4 KV heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
    return folder


def answer(model: Any, ids: torch.Tensor, mask: torch.Tensor, count: int, forced: torch.Tensor | None) -> Any:
    """Greedy tokens, the logits along ``forced`` (default: the greedy tokens), and the cache."""
    model.set_attn_implementation("tq4")
    cache = TQ4Cache(model.config)
    tokens = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    text = tokens if forced is None else forced
    full = torch.cat([mask, torch.ones_like(text[:, ids.shape[1] :])], 1)
    again = TQ4Cache(model.config)
    positions = (full.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        options = {"past_key_values": again, "use_cache": True}
        split = text.shape[1] - 4
        parts = []
        for start, stop in [(0, split), *((at, at + 1) for at in range(split, text.shape[1]))]:
            here = slice(start, stop)
            mask = full[:, :stop]
            out = model(text[:, here], attention_mask=mask, position_ids=positions[:, here], **options)
            parts.append(out.logits)
    logits = torch.cat([part.to_local() if hasattr(part, "to_local") else part for part in parts], 1)
    return tokens, logits.float()[full > 0], cache


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder with a model of 256 tokens or more [a random Llama]")
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gpu = torch.cuda.device_count() >= world
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if gpu else "gloo")
    paths: list[Any] = [args.model]
    folder = tempfile.TemporaryDirectory()
    if args.model is None and rank == 0:
        paths = [str(small_model(Path(folder.name)))]
    dist.broadcast_object_list(paths)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 250, (3, 40), generator=generator).to(device)
    mask = (torch.arange(40) >= torch.tensor([0, 9, 25])[:, None]).long().to(device)

    expected: list[Any] = [None, None, None]
    if rank == 0:
        alone = AutoModelForCausalLM.from_pretrained(paths[0], dtype=torch.float16).to(device).eval()
        tokens, logits, cache = answer(alone, ids, mask, args.tokens, None)
        expected = [tokens.cpu(), logits.cpu(), cache.nbytes]
        del alone
    dist.broadcast_object_list(expected)

    plan = DistributedConfig(tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(
        paths[0], dtype=torch.float16, distributed_config=plan
    ).eval()
    tokens, logits, cache = answer(model, ids, mask, args.tokens, expected[0].to(device))
    error = float((logits.cpu() - expected[1]).norm() / expected[1].norm())
    argmax = float((logits.cpu().argmax(-1) == expected[1].argmax(-1)).float().mean())
    same = float((tokens.cpu() == expected[0]).float()[:, ids.shape[1] :].mean())
    heads = {layer.num_kv_heads for layer in cache.tq4_layers}
    whole = model.config.num_key_value_heads
    good = (
        error < LOGITS_BOUND
        and argmax >= ARGMAX_BOUND
        and heads == {whole // world}
        and cache.nbytes * world == expected[2]
    )
    line = (
        f"rank {rank} of {world} on {device}: {heads} of {whole} KV heads, {cache.nbytes} of "
        f"{expected[2]} bytes; logits differ by {error:.4f}, "
        f"argmaxes agree on {argmax:.3f}, generated tokens on {same:.3f}: "
        f"{'ok' if good else 'WRONG'}"
    )
    lines: list[Any] = [None] * world
    dist.all_gather_object(lines, (line, good))
    if rank == 0:
        print("\n".join(text for text, _ in lines), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return 0 if all(ok for _, ok in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
