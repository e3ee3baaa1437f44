"""What a TQ4 cache costs a language model: the work behind ``tq4 eval``.

Windows of text are fed in chunks to the model with each kind of cache side by side; each token's
log-probability and each position's most likely next token are compared with those of the dense cache, in
pairs (:mod:`.paired`).  Then some tokens are decoded one by one for their time, continuations are generated
greedily, and those of the dense cache are decoded again by every backend (:mod:`.agreement`).
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.cache_utils import DynamicCache, QuantizedCache

import tq4

from . import agreement, paired
from .report import environment
from .transformers import TQ4Cache

DENSE, TQ4, FP16_SCORES = "dense", "TQ4", "TQ4, fp16 scores"
#: Tokens fed one by one for the time of decoding, and before that to warm up.
_DECODE_TOKENS, _WARM_TOKENS = 32, 4
_BINS = 16
_BYTE_VOCABULARY = 256


@dataclass
class Settings:
    """What to evaluate.

    Attributes:
        model: a folder (or hub name) that ``AutoModelForCausalLM.from_pretrained`` loads.
        text: files, read one after the other.
        window: tokens of a window; each begins with an empty cache.
        windows: at most so many.
        pair_windows: at most so many for the comparison of INT8 with fp16 scores, which needs many (200K
            tokens for a standard error of some 0.025 %): those past ``windows`` are read by these two caches
            alone.
        chunk: tokens of one forward call.
        edge: layers at each end that the variant "edge layers dense" keeps dense.
        backends: one more TQ4 row for each; two or more are also compared on the dense cache's continuations.
        generate, prompts, prompt: tokens to generate, number of prompts and their length; 0 tokens: none.
        page: tokens of a page.
        dtype, device: "float16" or "bfloat16"; "cuda" or "cpu".
    """

    model: str
    text: list[Path]
    window: int = 8192
    windows: int = 8
    pair_windows: int = 24
    chunk: int = 1024
    edge: int = 1
    backends: list[str] = field(default_factory=list)
    generate: int = 256
    prompts: int = 16
    prompt: int = 512
    page: int = 16
    dtype: str = "bfloat16"
    device: str = "cuda"


@dataclass
class Variant:
    """One kind of cache, and what came of it."""

    name: str
    attention: str
    make: Callable[[int], Any]
    backend: str | None = None  # of a row that is there to compare backends
    nats: float = 0.0
    agreement: float = 1.0
    vs_dense: paired.Change | None = None
    vs_tq4: paired.Change | None = None
    agreement_with_tq4: float | None = None
    cache_bytes: int = 0
    prefill_us: float = 0.0
    decode_ms: float = 0.0
    greedy_same: float | None = None
    greedy_prefix: float | None = None
    by_position: list[float] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list, repr=False)  # of each window
    choices: list[torch.Tensor] = field(default_factory=list, repr=False)  # of each chunk
    seconds: float = 0.0


@dataclass
class Scores:
    """INT8 against fp16 scores of the same kernels, on ``tokens`` tokens.

    Attributes:
        tokens: of text that was scored.
        change: of nats, INT8 relative to fp16; its error is that of blocks of :data:`paired.BLOCK` tokens.
        window_error: its standard error were only whole windows independent; None for one window.
        agreement: of next-token argmaxes.
    """

    tokens: int
    change: paired.Change
    window_error: float | None
    agreement: float


@dataclass
class Result:
    """All variants, what they were measured on, and for how long; losses are in nats per ``unit``."""

    settings: Settings
    unit: str
    scored: int
    shape: dict[str, int]
    environment: dict[str, Any]
    variants: list[Variant]
    missing: list[str]
    scores: Scores
    seconds: dict[str, float]  # of each phase
    backends: agreement.Agreement | None = None


class _Phases:
    """A progress bar of steps called "phase, what", and a line with the seconds of each phase as it ends.

    A step lasts until the next one.  Nothing waits for the GPU within a phase, so that of steps which do not
    either only the phase's sum is exact.
    """

    def __init__(self, progress: Progress, device: str) -> None:
        self.progress = progress
        self.device = torch.device(device)
        self.task = progress.add_task("load", total=None)
        self.seconds: dict[str, dict[str, float]] = {}
        self._last = ("load", "")
        self._since = time.perf_counter()

    def begin(self, steps: int) -> None:
        """How many steps there will be."""
        self.progress.update(self.task, total=steps)

    def __call__(self, title: str) -> None:
        """The next step."""
        phase, _, what = title.partition(", ")
        self._end(phase)
        self._last = (phase, what)
        self.progress.update(self.task, description=title, advance=1)

    def finish(self) -> dict[str, float]:
        """The seconds of each phase; prints them."""
        self._end(None)
        sums = {phase: sum(steps.values()) for phase, steps in self.seconds.items()}
        self._print("seconds", sums)
        return sums

    def _end(self, following: str | None) -> None:
        phase, what = self._last
        if phase != following:
            _synchronise(self.device)
        now = time.perf_counter()
        steps = self.seconds.setdefault(phase, {})
        steps[what] = steps.get(what, 0.0) + now - self._since
        self._since = now
        if phase != following:
            self._print(phase, steps)

    def _print(self, title: str, parts: dict[str, float]) -> None:
        named = "; ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items() if name)
        line = f"{title}: {sum(parts.values()):.1f} s" + (f" ({named})" if named else "")
        self.progress.console.print(line, highlight=False, soft_wrap=True)


def run(settings: Settings, console: Console | None = None) -> Result:
    """Evaluate, with a progress bar and the seconds of each phase, on stderr unless a console is given.

    Raises:
        ValueError: a setting, or a model without a tokenizer that is not byte-level.
        RuntimeError: no GPU, or a requested backend that cannot run.
    """
    _check(settings)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with torch.no_grad(), Progress(*columns, console=console or Console(stderr=True)) as progress:
        return _run(settings, _Phases(progress, settings.device))


def _run(settings: Settings, phases: _Phases) -> Result:
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=getattr(torch, settings.dtype))
    model = model.to(settings.device).eval()
    ids, bytes_per_token = _tokens(settings, model)
    windows = _windows(ids, settings.window, max(settings.windows, settings.pair_windows))
    windows, more = windows[: settings.windows], windows[settings.windows :]
    variants, missing = _variants(settings, model)
    # The rows of INT8 and fp16 scores go on where the others have read enough.
    pair = [variant for variant in variants if variant.name in (TQ4, FP16_SCORES)]
    free = [variant for variant in variants if variant.backend is None]
    chunks = [sum(-(-window.numel() // settings.chunk) for window in some) for some in (windows, more)]
    total = (chunks[0] + 2) * len(variants) + chunks[1] * len(pair)
    if settings.generate:
        total += len(free) + agreement.steps(settings.backends, settings.generate)
    compared = None
    phases.begin(total)
    for variant in variants:
        phases(f"warm up, {variant.name}")
        _warm_up(model, variant, windows[0], settings)
    for window in windows:
        caches = _score(model, variants, window, settings, phases, "windows")
    for variant, cache in zip(variants, caches, strict=True):
        phases(f"decode, {variant.name}")
        _decode(model, variant, cache, windows[-1], settings)
    del caches
    pair = [replace(one, losses=list(one.losses), choices=list(one.choices)) for one in pair]
    for window in more:
        _score(model, pair, window, settings, phases, "pair windows")
    if settings.generate:
        prompts, text = _generate(model, free, ids, settings, phases)
        options = {"page_size": settings.page, "max_length": prompts.shape[1] + settings.generate}
        compared = agreement.compare(model, prompts, text, settings.backends, options, phases)
    seconds = phases.finish()
    _summarise(variants, bytes_per_token)
    config = model.config.get_text_config(decoder=True)
    shape = {
        "hq": config.num_attention_heads,
        "hkv": config.num_key_value_heads,
        "d": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "layers": config.num_hidden_layers,
    }
    return Result(
        settings=settings,
        unit="byte",
        scored=sum(window.numel() - 1 for window in windows),
        shape=shape,
        environment=environment(settings.device),
        variants=variants,
        missing=missing,
        scores=_scores(*pair),
        seconds=seconds,
        backends=compared,
    )


def _check(settings: Settings) -> None:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            "device: torch sees no CUDA GPU; --device cpu is slow, for small models and windows"
        )
    for name in ("window", "windows", "chunk", "prompts", "prompt"):
        if getattr(settings, name) < (2 if name == "window" else 1):
            raise ValueError(f"{name}: expected a positive number, got {getattr(settings, name)}")
    if len(settings.backends) > 1 and settings.generate and settings.prompt < 2:
        raise ValueError(f"prompt: expected at least 2 tokens to compare backends, got {settings.prompt}")
    if not settings.text:
        raise ValueError("text: expected at least one file")
    for backend in settings.backends:
        ok, reason = tq4.dispatch.availability(backend, torch.device(settings.device))
        if not ok:
            raise RuntimeError(f"backends: {backend} cannot run: {reason}")


def _tokens(settings: Settings, model: PreTrainedModel) -> tuple[torch.Tensor, float]:
    """Token ids of the text, and bytes a token; a model of 256 tokens without a tokenizer reads bytes."""
    data = b"".join(Path(path).read_bytes() for path in settings.text)
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        if model.get_input_embeddings().num_embeddings != _BYTE_VOCABULARY:
            raise ValueError(f"model: it has no tokenizer that loads ({error})") from None
        ids = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    else:
        ids = tokenizer(data.decode("utf-8", "replace"), return_tensors="pt").input_ids[0]
    if ids.numel() < 2:
        raise ValueError("text: expected at least two tokens")
    return ids.to(settings.device), len(data) / ids.numel()


def _windows(ids: torch.Tensor, tokens: int, count: int) -> list[torch.Tensor]:
    whole = [w for w in ids.split(tokens) if w.numel() == tokens]
    return (whole or [ids])[:count]


def _variants(settings: Settings, model: PreTrainedModel) -> tuple[list[Variant], list[str]]:
    def tq4_variant(name: str, **options: Any) -> Variant:
        def make(length: int) -> TQ4Cache:
            return TQ4Cache(model, page_size=settings.page, max_length=length, **options)

        return Variant(name, "tq4", make, options.get("backend"))

    variants = [
        Variant(DENSE, "sdpa", lambda length: DynamicCache(config=model.config)),
        tq4_variant(TQ4),
        tq4_variant("TQ4, norm correction", norm_correction=True),
        tq4_variant("TQ4, edge layers dense", dense_first=settings.edge, dense_last=settings.edge),
        tq4_variant("TQ4, first chunk dense", first_chunk="dense"),
        tq4_variant(FP16_SCORES, int8=False),
    ]
    variants += [tq4_variant(f"TQ4, {backend} backend", backend=backend) for backend in settings.backends]
    missing = []
    for backend, package, axes in (("quanto", "optimum.quanto", 0), ("hqq", "hqq", 1)):
        try:
            found = importlib.util.find_spec(package) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            missing.append(package)
            continue
        options = {"nbits": 4, "axis_key": axes, "axis_value": axes}

        def make(length: int, backend: str = backend, options: dict[str, int] = options) -> QuantizedCache:
            return QuantizedCache(backend=backend, config=model.config, **options)

        variants.append(Variant(f"{backend}, 4 bits", "sdpa", make))
    return variants, missing


def _forward(model: PreTrainedModel, variant: Variant, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of ids [T] after what the cache holds, timed."""
    model.set_attn_implementation(variant.attention)
    _synchronise(ids.device)
    start = time.perf_counter()
    logits = model(ids[None], past_key_values=cache, use_cache=True).logits[0]
    _synchronise(ids.device)
    variant.seconds += time.perf_counter() - start
    return logits


def _warm_up(model: PreTrainedModel, variant: Variant, window: torch.Tensor, settings: Settings) -> None:
    """Compile what compiles, so that it is not timed."""
    cache = variant.make(_capacity(settings))
    for part in (window[: settings.chunk], window[: settings.chunk], window[:1]):
        if cache.get_seq_length() + part.numel() <= settings.window:
            _forward(model, variant, cache, part)
    variant.seconds = 0.0


def _capacity(settings: Settings) -> int:
    return settings.window + _WARM_TOKENS + _DECODE_TOKENS


def _score(
    model: PreTrainedModel,
    variants: list[Variant],
    window: torch.Tensor,
    settings: Settings,
    advance: Callable[[str], None],
    title: str,
) -> list[Any]:
    """Losses and choices of all variants on one window; returns the full caches."""
    caches = [variant.make(_capacity(settings)) for variant in variants]
    losses: list[list[torch.Tensor]] = [[] for _ in variants]
    for first in range(0, window.numel(), settings.chunk):
        part = window[first : first + settings.chunk]
        targets = window[first + 1 : first + 1 + part.numel()]
        for variant, cache, parts in zip(variants, caches, losses, strict=True):
            advance(f"{title}, {variant.name}")
            logits = _forward(model, variant, cache, part)[: targets.numel()].float()
            parts.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none").cpu())
            variant.choices.append(logits.argmax(-1).cpu())
    for variant, cache, parts in zip(variants, caches, losses, strict=True):
        variant.losses.append(torch.cat(parts))
        variant.cache_bytes = cache_bytes(cache, window.numel())
    return caches


def _decode(
    model: PreTrainedModel, variant: Variant, cache: Any, window: torch.Tensor, settings: Settings
) -> None:
    """Time of one token after a whole window."""
    # The time of all windows so far is that of their prefill.
    variant.prefill_us = 1e6 * variant.seconds / sum(losses.numel() + 1 for losses in variant.losses)
    for i in range(_WARM_TOKENS):
        _forward(model, variant, cache, window[i : i + 1])
    variant.seconds = 0.0
    for i in range(_DECODE_TOKENS):
        _forward(model, variant, cache, window[i : i + 1])
    variant.decode_ms = 1e3 * variant.seconds / _DECODE_TOKENS


def _generate(
    model: PreTrainedModel,
    variants: list[Variant],
    ids: torch.Tensor,
    settings: Settings,
    advance: Callable[[str], None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy continuations of prompts spread over the text, compared with those of the dense cache.

    Returns:
        The prompts ``[B, P]`` and the dense cache's continuations ``[B, G]``.
    """
    length = min(settings.prompt, max(1, ids.numel() // 2))
    starts = torch.linspace(0, ids.numel() - length, settings.prompts).long().tolist()
    prompts = torch.stack([ids[start : start + length] for start in starts])
    expected = None
    for variant in variants:
        advance(f"generate, {variant.name}")
        model.set_attn_implementation(variant.attention)
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            past_key_values=variant.make(length + settings.generate),
            max_new_tokens=settings.generate,
            min_new_tokens=settings.generate,
            do_sample=False,
            pad_token_id=0,
        )[:, length:]
        expected = out if expected is None else expected
        same = out == expected
        variant.greedy_same = float(same.float().mean())
        variant.greedy_prefix = float(same.long().cumprod(1).sum(1).float().mean())
    return prompts, expected


def _summarise(variants: list[Variant], bytes_per_token: float) -> None:
    """Means of what was collected; losses per byte."""
    dense, default = variants[0], variants[1]
    for variant in variants:
        losses, choices = torch.cat(variant.losses), torch.cat(variant.choices)
        variant.nats = float(losses.double().mean()) / bytes_per_token
        variant.agreement = float((choices == torch.cat(dense.choices)).float().mean())
        variant.vs_dense = paired.change(variant.losses, dense.losses)
        if variant.attention == "tq4":
            variant.vs_tq4 = paired.change(variant.losses, default.losses)
            variant.agreement_with_tq4 = float((choices == torch.cat(default.choices)).float().mean())
        # By position in the window: where the cost of the cache grows with the context, it shows.
        mean = torch.stack(variant.losses).double().mean(0)
        variant.by_position = [float(part.mean()) / bytes_per_token for part in mean.chunk(_BINS)]


def _scores(int8: Variant, exact: Variant) -> Scores:
    same = torch.cat(int8.choices) == torch.cat(exact.choices)
    return Scores(
        tokens=sum(losses.numel() for losses in int8.losses),
        change=paired.change(int8.losses, exact.losses),
        window_error=paired.change(int8.losses, exact.losses, same.numel()).error,
        agreement=float(same.float().mean()),
    )


def cache_bytes(cache: Any, tokens: int) -> int:
    """Bytes that a cache of some tokens holds: of a TQ4Cache the pages in use, of others all tensors."""
    if isinstance(cache, TQ4Cache):
        total = 0
        for layer in cache.layers:
            pool = getattr(layer, "pool", None)
            if pool is None:
                total += _tensor_bytes([getattr(layer, "keys", None), getattr(layer, "values", None)])
            else:
                pages = -(-tokens // pool.block_size)
                total += pages * pool.nbytes // pool.num_blocks
        return total
    return sum(_tensor_bytes(list(vars(layer).values())) for layer in cache.layers)


def _tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested containers, and of the parts of wrapper tensors."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            return sum(_tensor_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        return value.nbytes
    if isinstance(value, dict):
        return _tensor_bytes(list(value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_tensor_bytes, value))
    return 0


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
