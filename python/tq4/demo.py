"""``tq4 demo``: store -> prefill -> decode on real or generated data, and one table of what came out.

The data is one sequence of T tokens.  All but the last few are stored and attended to by one prefill call,
the last ones are stored and decoded one by one.  Each backend works on a cache of its own, with its pages in
shuffled order.  Two yardsticks, both computed in fp32:

- *unquantised*: attention over the original keys and values; the distance to it is the cost of TQ4 itself;
- *same cache*: exact attention over what the cache decodes to; the distance to it is what a backend's INT8
  arithmetic adds, and has to stay an order of magnitude below the first.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from . import dispatch
from .cache import PagedCache
from .layout import HEAD_DIMS, token_bytes
from .quantizer import Quantizer

_GENERATED_TOKENS = {"cuda": 4096, "cpu": 1024}
_BLOCK_OF_QUERIES = 256  # of the fp32 yardsticks: bounds the score matrix to Hq * 256 * T


@dataclass
class Settings:
    """What to run; the fields are the options of ``tq4 demo``."""

    qkv: Path | None = None
    tokens: int | None = None
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    decode_tokens: int = 8
    page: int = 16
    layout: str = "token_major"
    rotation: str = "hadamard"
    norm_correction: bool = False
    dtype: str = "float16"
    device: str = "auto"
    seed: int = 0


@dataclass
class Row:
    """One line of the table.  Errors are relative (Frobenius); None where there is none to give."""

    step: str  # "store", "prefill", "decode"
    implementation: str
    vs_unquantised: float | None
    vs_same_cache: float | None
    ms: float | None
    speedup: float | None  # over torch's attention in the same step


@dataclass
class Result:
    """Everything `tq4 demo` prints."""

    data: str
    device: str
    shape: dict[str, int]
    dtype: str
    layout: str
    rotation: str
    cache_bytes: int
    fp16_bytes: int
    key_error: float  # of decoding the cache, against the original keys
    value_error: float
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


# ---- Data


def generate(tokens: int, q_heads: int, kv_heads: int, head_dim: int, seed: int) -> tuple[torch.Tensor, ...]:
    """A small example with what makes real attention hard to quantise.

    Keys and queries share a few outlier channels that are ten times larger than the rest and have a non-zero
    mean, as after RoPE's slow dimensions; the first four tokens are attention sinks: every query points at
    their keys, and their values are small.  Each query also resembles the key of one earlier token, so that
    attention is peaked rather than flat.

    Returns:
        q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D], fp32 on the CPU.
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cpu")

    group = q_heads // kv_heads
    outliers = torch.randperm(head_dim, generator=generator, device="cpu")[: max(2, head_dim // 32)]
    channel = torch.ones(head_dim)
    channel[outliers] = 10.0
    mean = torch.zeros(kv_heads, head_dim)
    mean[:, outliers] = 6.0 * normal(kv_heads, len(outliers)).sign()
    k = normal(tokens, kv_heads, head_dim)
    v = normal(tokens, kv_heads, head_dim)

    uniform = torch.rand(tokens, q_heads, generator=generator, device="cpu")
    earlier = (uniform * torch.arange(1, tokens + 1)[:, None]).long()
    head = torch.arange(q_heads) // group
    q = normal(tokens, q_heads, head_dim) + 0.6 * k[earlier, head]

    direction = normal(kv_heads, head_dim)
    direction[:, outliers] = 0.0
    direction /= direction.norm(dim=-1, keepdim=True)
    sinks = min(4, tokens)
    k[:sinks] += 2.5 * math.sqrt(head_dim) * direction / torch.arange(1, sinks + 1)[:, None, None]
    v[:sinks] *= 0.1
    q += 4.0 * direction[head]

    # The outlier channels go into the keys; queries are small there, as models learn them to be.
    k = k * channel + mean
    q = q / channel.sqrt()
    return q, k, v


def load(path: Path, tokens: int | None) -> tuple[torch.Tensor, ...]:
    """q, k and v of a safetensors file, the first ``tokens`` tokens of them.

    Raises:
        ValueError: the file is not one, or q, k, v are missing or do not fit together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"--qkv {path}: not a safetensors file: {error}") from None
    missing = [name for name in ("q", "k", "v") if name not in tensors]
    if missing:
        raise ValueError(f"--qkv {path}: expected tensors q, k and v, got {', '.join(sorted(tensors))}")
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[::2] != k.shape[::2]:
        raise ValueError(
            f"--qkv {path}: expected q [T, Hq, D], k and v [T, Hkv, D], got q {list(q.shape)}, "
            f"k {list(k.shape)}, v {list(v.shape)}"
        )
    if tokens is not None and tokens > q.shape[0]:
        raise ValueError(f"--tokens {tokens}: the file has {q.shape[0]}")
    return tuple(t[:tokens].float() for t in (q, k, v))


# ---- Yardsticks


def exact_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, advance: Callable[[], None] = lambda: None
) -> torch.Tensor:
    """Causal bottom-right attention in fp32, a block of queries at a time.

    Args:
        q: [T, Hq, D]; the last query sits at the last key.
        k, v: [L, Hkv, D].
        advance: called after every block.

    Returns:
        fp32 [T, Hq, D].
    """
    queries, q_heads, dim = q.shape
    keys, kv_heads, _ = k.shape
    kt = k.float().permute(1, 2, 0)  # [Hkv, D, L]
    vt = v.float().transpose(0, 1)  # [Hkv, L, D]
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    for begin in range(0, queries, _BLOCK_OF_QUERIES):
        end = min(begin + _BLOCK_OF_QUERIES, queries)
        last = keys - queries + end  # keys that the last query of the block sees
        block = q[begin:end].float().view(end - begin, kv_heads, -1, dim)
        block = block.permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)  # rows: (head of the group, query)
        scores = (block @ kt[..., :last]) / math.sqrt(dim)
        position = torch.arange(keys - queries + begin, last, device=q.device)
        hidden = torch.arange(last, device=q.device)[None, :] > position[:, None]
        scores = scores.view(kv_heads, -1, end - begin, last).masked_fill_(hidden, -torch.inf)
        block = scores.softmax(-1).view(kv_heads, -1, last) @ vt[:, :last]
        block = block.view(kv_heads, q_heads // kv_heads, end - begin, dim).permute(2, 0, 1, 3)
        out[begin:end] = block.reshape(end - begin, q_heads, dim)
        advance()
    return out


def torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """torch.nn.functional.scaled_dot_product_attention on the dense, unquantised tensors."""
    query, key, value = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=causal, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def _relative(x: torch.Tensor, reference: torch.Tensor) -> float:
    return float((x.float() - reference).norm() / reference.norm())


# ---- Timing


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    """``call`` as a CUDA graph, which is how engines decode: no time of the host between kernels."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is compiled or set up once is, outside of the capture
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class _Clock:
    """Median time of a call in ms: CUDA events with a cold L2, or the wall clock on a CPU.

    On a GPU the call is captured and replayed, but where it cannot be (``eager``).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            self._flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], object], eager: bool = False) -> float:
        if self._flush is None:
            times = []
            begin = time.perf_counter()
            while not times or (len(times) < 5 and time.perf_counter() - begin < 1.0):
                start = time.perf_counter()
                call()
                times.append((time.perf_counter() - start) * 1e3)
            return statistics.median(times)
        call = call if eager else _captured(call)
        call()
        events = []
        for _ in range(20):
            self._flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize(self._device)
        return statistics.median(start.elapsed_time(end) for start, end in events)


# ---- The run


class _Sequence:
    """One sequence in a paged cache, its pages in shuffled order, run by one backend."""

    def __init__(self, settings: Settings, data: tuple[torch.Tensor, ...], quantizer: Quantizer) -> None:
        q, k, v = data
        tokens, kv_heads, head_dim = k.shape
        self.first = tokens - settings.decode_tokens  # tokens of the prefill
        page = settings.page
        pages = -(-tokens // page)
        self.q, self.k, self.v, self.quantizer = q, k, v, quantizer
        self.cache = PagedCache(
            pages, kv_heads, head_dim, block_size=page, layout=settings.layout, device=q.device
        )
        generator = torch.Generator("cpu").manual_seed(settings.seed)
        order = torch.randperm(pages, generator=generator, device="cpu")
        blocks = torch.tensor(self.cache.allocate(pages), device="cpu")[order]
        position = torch.arange(tokens, device="cpu")
        self.slots = (blocks[position // page] * page + position % page).to(q.device)
        self.block_table = blocks[None].to(q.device, torch.int32)
        self.lengths = torch.arange(tokens + 1, dtype=torch.int32, device=q.device)
        self.starts = torch.tensor([0, self.first], dtype=torch.int32, device=q.device)

    def store(self, begin: int, end: int, backend: str) -> None:
        from . import store

        new = slice(begin, end)
        store(self.k[new], self.v[new], self.cache, self.slots[new], self.quantizer, backend=backend)

    def prefill(self, backend: str) -> torch.Tensor:
        from . import prefill

        return prefill(
            self.q[: self.first],
            self.cache,
            self.block_table,
            self.lengths[self.first : self.first + 1],
            self.starts,
            self.quantizer,
            max_query_len=self.first,
            backend=backend,
        )

    def decode(self, position: int, backend: str) -> torch.Tensor:
        from . import decode

        length = self.lengths[position + 1 : position + 2]
        query = self.q[position : position + 1]
        return decode(query, self.cache, self.block_table, length, self.quantizer, backend=backend)

    def gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the cache decodes to, fp32, by the reference."""
        from . import gather

        tokens = self.k.shape[0]
        return gather(
            self.cache,
            self.block_table,
            self.lengths[tokens:],
            self.quantizer,
            dtype=torch.float32,
            total=tokens,
            backend="reference",
        )


def _prepare(settings: Settings, device: torch.device) -> tuple[str, tuple[torch.Tensor, ...]]:
    if settings.qkv is not None:
        data = load(settings.qkv, settings.tokens)
        name = settings.qkv.name
    else:
        if settings.q_heads % settings.kv_heads:
            raise ValueError(f"--q-heads {settings.q_heads} is no multiple of --kv-heads {settings.kv_heads}")
        tokens = settings.tokens or _GENERATED_TOKENS[device.type]
        data = generate(tokens, settings.q_heads, settings.kv_heads, settings.head_dim, settings.seed)
        name = f"generated, seed {settings.seed}: attention sinks and outlier channels"
    q, k, _ = data
    if q.shape[2] not in HEAD_DIMS:
        raise ValueError(f"head_dim {q.shape[2]}: expected one of {', '.join(map(str, HEAD_DIMS))}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} KV heads")
    if settings.page < 16 or settings.page % 16:
        raise ValueError(f"--page {settings.page}: expected a multiple of 16")
    if settings.decode_tokens >= q.shape[0]:
        raise ValueError(f"--decode-tokens {settings.decode_tokens}: there are {q.shape[0]} tokens in all")
    dtype = getattr(torch, settings.dtype)
    return name, tuple(t.to(device, dtype).contiguous() for t in data)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: torch sees no CUDA device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def run(settings: Settings, console: Console | None = None) -> Result:
    """Run the demo.

    Args:
        settings: the options.
        console: where the progress display goes; default: standard error.

    Raises:
        ValueError: options or data that do not fit.
        RuntimeError: the requested device is not there.
    """
    device = _device(settings.device)
    title, (q, k, v) = _prepare(settings, device)
    tokens, q_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    first = tokens - settings.decode_tokens  # tokens of the prefill
    quantizer = Quantizer(
        head_dim, rotation=settings.rotation, norm_correction=settings.norm_correction, device=device
    )
    # "cuda-sm80" is the same extension with its newer kernels switched off: for tests, not for a table.
    # On a CPU there is the reference only, whether or not Triton's interpreter is switched on.
    candidates = ("cuda", "triton", "reference") if device.type == "cuda" else ("reference",)
    reasons = {name: dispatch.availability(name, device) for name in candidates}
    backends = [name for name, (available, _) in reasons.items() if available]

    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console or Console(stderr=True),
        transient=True,
    )
    blocks = -(-first // _BLOCK_OF_QUERIES) + -(-settings.decode_tokens // _BLOCK_OF_QUERIES)
    with progress, torch.inference_mode():
        task = progress.add_task("exact attention", total=2 * blocks + 7 * len(backends) + 2)

        def advance(description: str | None = None) -> None:
            progress.update(task, advance=1, **({"description": description} if description else {}))

        def yardstick(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            whole = exact_attention(q[:first], keys[:first], values[:first], advance)
            last = exact_attention(q[first:], keys, values, advance)
            return whole, last

        unquantised = yardstick(k, v)
        reference = _Sequence(settings, (q, k, v), quantizer)
        reference.store(0, tokens, "reference")
        decoded = reference.gather()
        same_cache = yardstick(*decoded)
        result = Result(
            data=title,
            device=_device_name(device),
            shape={
                "tokens": tokens,
                "prefill": first,
                "decode": settings.decode_tokens,
                "q_heads": q_heads,
                "kv_heads": kv_heads,
                "head_dim": head_dim,
                "page": settings.page,
            },
            dtype=settings.dtype,
            layout=settings.layout,
            rotation=settings.rotation,
            cache_bytes=tokens * token_bytes(kv_heads, head_dim),
            fp16_bytes=tokens * kv_heads * head_dim * 2 * 2,
            key_error=_relative(decoded[0], k.float()),
            value_error=_relative(decoded[1], v.float()),
        )
        _measure(settings, (q, k, v), quantizer, backends, unquantised, same_cache, result, advance)
    for name, (available, reason) in reasons.items():
        if not available:
            result.notes.append(f"{name} did not run: {reason}")
    return result


def _measure(
    settings: Settings,
    data: tuple[torch.Tensor, ...],
    quantizer: Quantizer,
    backends: list[str],
    unquantised: tuple[torch.Tensor, torch.Tensor],
    same_cache: tuple[torch.Tensor, torch.Tensor],
    result: Result,
    advance: Callable[[str | None], None],
) -> None:
    """Fill result.rows: every step by every backend."""
    q, k, v = data
    tokens = q.shape[0]
    first = tokens - settings.decode_tokens
    clock = _Clock(q.device)
    # On a CPU the only backend is the reference in plain torch: there is nothing to race.
    race = q.device.type == "cuda"
    stores, prefills, decodes = [], [], []

    peer_ms = [None, None]
    if race:
        advance("torch attention")
        peer_ms = [
            clock(lambda: torch_attention(q[:first], k[:first], v[:first], True)),
            clock(lambda: torch_attention(q[-1:], k, v, False)),
        ]
    whole = torch_attention(q[:first], k[:first], v[:first], True)
    last = torch.cat(
        [torch_attention(q[i : i + 1], k[: i + 1], v[: i + 1], False) for i in range(first, tokens)]
    )
    peer = "torch SDPA, dense"
    prefills.append(Row("prefill", peer, _relative(whole, unquantised[0]), None, peer_ms[0], None))
    decodes.append(Row("decode", peer, _relative(last, unquantised[1]), None, peer_ms[1], None))
    advance(None)

    for backend in backends:
        sequence = _Sequence(settings, (q, k, v), quantizer)
        advance(f"{backend}: store")
        sequence.store(0, first, backend)
        advance(f"{backend}: prefill")
        whole = sequence.prefill(backend)
        advance(f"{backend}: decode")
        outputs = []
        for position in range(first, tokens):
            sequence.store(position, position + 1, backend)
            outputs.append(sequence.decode(position, backend))
        last = torch.cat(outputs)
        advance(f"{backend}: time of store")
        eager = backend == "reference"  # plain torch that reads lengths on the host
        store_ms = clock(lambda: sequence.store(0, first, backend), eager)  # noqa: B023 (called at once)
        advance(f"{backend}: time of prefill")
        prefill_ms = clock(lambda: sequence.prefill(backend), eager)  # noqa: B023
        advance(f"{backend}: time of decode")
        decode_ms = clock(lambda: sequence.decode(tokens - 1, backend), eager)  # noqa: B023
        stores.append(Row("store", backend, None, None, store_ms, None))
        for rows, step, i, out, ms in (
            (prefills, "prefill", 0, whole, prefill_ms),
            (decodes, "decode", 1, last, decode_ms),
        ):
            errors = _relative(out, unquantised[i]), _relative(out, same_cache[i])
            rows.append(Row(step, backend, *errors, ms, peer_ms[i] / ms if race else None))
        advance(None)
    result.rows = stores + prefills + decodes
    if not race:
        result.notes.append("The CUDA and Triton kernels need a GPU; the reference is not written to race.")


# ---- Output


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def columns() -> tuple[str, ...]:
    """The header of the table; errors are relative (Frobenius norms)."""
    return ("step", "by", "error vs\nunquantised", "vs exact,\nsame cache", "ms", "SDPA ms\n/ ms")


def table(result: Result) -> list[tuple[str, ...]]:
    """The table as text, one tuple a row, in the order of :func:`columns`."""
    ratio = f"{result.fp16_bytes / result.cache_bytes:.2f}x"
    size = f"{_bytes(result.cache_bytes // 2)}, fp16 {_bytes(result.fp16_bytes // 2)}: {ratio}"
    rows = [
        ("cache, K", size, f"{result.key_error:.4f}", "", "", ""),
        ("cache, V", size, f"{result.value_error:.4f}", "", "", ""),
    ]
    for row in result.rows:
        rows.append(
            (
                row.step,
                row.implementation,
                "" if row.vs_unquantised is None else f"{row.vs_unquantised:.4f}",
                "" if row.vs_same_cache is None else f"{row.vs_same_cache:.5f}",
                "" if row.ms is None else format(row.ms, ".3g" if row.ms < 1000 else ".0f"),
                "" if row.speedup is None else f"{row.speedup:.2f}",
            )
        )
    return rows


def headline(result: Result) -> str:
    """What was run, in one sentence."""
    shape = result.shape
    return (
        f"{result.data}; {result.device}, {shape['q_heads']} query / {shape['kv_heads']} KV heads, "
        f"D = {shape['head_dim']}, {shape['prefill']} tokens prefilled, {shape['decode']} decoded, "
        f"{result.dtype}, page {shape['page']}, {result.layout}, {result.rotation} rotation"
    )


def to_json(result: Result) -> str:
    """The result as one JSON object."""
    return json.dumps(asdict(result), indent=1) + "\n"


def show(result: Result, console: Console | None = None) -> None:
    """Print the table."""
    console = console or Console()
    grid = Table(
        title=headline(result),
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    grid.caption = "\n".join(result.notes) or None
    for index, name in enumerate(columns()):
        grid.add_column(name, justify="left" if index < 2 else "right", overflow="fold")
    group = None
    for row in table(result):
        if group not in (None, row[0][:5]):
            grid.add_section()
        group = row[0][:5]
        grid.add_row(*row)
    console.print(grid)
