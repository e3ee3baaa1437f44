"""TQ4Cache: a transformers cache whose full-attention layers live in paged TQ4 storage.

A layer's ``update`` stores nothing.  It makes room and returns a :class:`CompressedKV` in place of K and V,
which the model passes on to the attention function "tq4" (:mod:`tq4.integrations.attention`); there the mask
is known, so that padding is left out, the fresh K and V are stored, and the queries attend to the pages.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from ..cache import PagedCache
from ..functional import decode, prefill, store
from ..layout import HEAD_DIMS, TOKEN_MAJOR
from ..quantizer import Quantizer, Rotation
from .paging import Paging, Step

_BITS = 4
_COMPRESSED, _DENSE = "compressed", "dense"
#: Up to this many query tokens a sequence, and rows (tokens x query heads of a KV head), decode is the faster
#: op.
_DECODE_TOKENS = 16
_DECODE_ROWS = 64

#: Attention without the interface through which the function "tq4" is reached, or with position biases.
_ALIBI_MODELS = ("bloom", "mpt")


class CompressedKV:
    """What a TQ4 layer returns as both K and V: the layer, and the fresh K and V that are to be stored.

    It has the attributes of the dense tensor it stands for that modeling code reads: ``shape``
    ``[B, Hkv, columns, D]``, ``dtype`` and ``device``.  Any computation with it is an error that says what to
    do.
    """

    def __init__(self, layer: TQ4Layer, key: torch.Tensor, value: torch.Tensor, columns: int) -> None:
        self.layer = layer
        self.key = key
        self.value = value
        self.shape = torch.Size((key.shape[0], key.shape[1], columns, key.shape[3]))
        self.dtype = key.dtype
        self.device = key.device
        self.stored = False

    @property
    def ndim(self) -> int:
        return 4

    def dim(self) -> int:
        return 4

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def to(self, *args: Any, **kwargs: Any) -> CompressedKV:
        """Itself where a tensor's ``to`` would be a no-op; anything else is an error."""
        moved = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        if moved.dtype != self.dtype or moved.device != self.device:
            self._refuse(f".to({moved.dtype}, {moved.device})")
        return self

    def __getitem__(self, index: Any) -> NoReturn:
        self._refuse("indexing")

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(f".{name}")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        cls._refuse(getattr(function, "__name__", str(function)))

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        raise RuntimeError(
            f"attn_implementation: the keys and values of a TQ4Cache are compressed, {what} cannot be "
            "applied to "
            'them. Call model.set_attn_implementation("tq4") first; a model whose attention does not go '
            "through "
            "transformers' AttentionInterface is not supported"
        )


class TQ4Layer(CacheLayerMixin):
    """One full-attention layer in TQ4 pages.

    Args:
        cache: the cache with the options and the bookkeeping that its layers share.
        index: of the layer.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: TQ4Cache, index: int) -> None:
        super().__init__()
        self.cache = cache
        self.index = index
        self.length = 0
        self.pool: PagedCache | None = None
        self._pending: CompressedKV | None = None

    # ---- The interface of a cache layer.

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Learn head count, head_dim, dtype and device from the first K and V ``[B, Hkv, T, D]``.

        Raises:
            ValueError: a head_dim that TQ4 has no kernels for, or another one of V than of K.
            TypeError: a model in float32.
        """
        head_dim = key_states.shape[-1]
        if value_states.shape[-1] != head_dim:
            raise ValueError(
                f"past_key_values: TQ4Cache needs K and V of the same head_dim, layer {self.index} has "
                f"{head_dim} "
                f"and {value_states.shape[-1]}"
            )
        if head_dim not in HEAD_DIMS:
            raise ValueError(
                f"past_key_values: TQ4Cache supports a head_dim of {', '.join(map(str, HEAD_DIMS))}, layer "
                f"{self.index} has {head_dim}"
            )
        if value_states.dtype not in (torch.float16, torch.bfloat16):
            raise TypeError(
                f"past_key_values: TQ4Cache needs a model in float16 or bfloat16, got {value_states.dtype}"
            )
        self.dtype, self.device = value_states.dtype, value_states.device
        self.num_kv_heads, self.head_dim = key_states.shape[1], head_dim
        self.quantizer = self.cache.quantizer(head_dim, self.device)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[CompressedKV, CompressedKV]:
        """Make room for K and V ``[B, Hkv, T, D]``; the attention function stores them.

        Raises:
            RuntimeError: the K and V of the last call were never attended to.
            ValueError: another batch size than before, or more tokens than max_length.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._pending is not None and not self._pending.stored:
            raise RuntimeError(
                f"attn_implementation: the last keys and values of layer {self.index} never reached the "
                "attention "
                'function "tq4"; call model.set_attn_implementation("tq4"), and reset() the cache'
            )
        paging = self.cache.paging
        batch, _, tokens, _ = key_states.shape
        if self.length == paging.length:  # the first layer of this forward call
            paging.advance(batch, tokens)
        elif self.length + tokens != paging.length:
            raise RuntimeError(
                f"past_key_values: layer {self.index} of the TQ4Cache has {self.length} tokens and got "
                f"{tokens} "
                f"more, other layers have {paging.length}; a forward call must have failed: reset() the cache"
            )
        self.length = paging.length
        self._pending = CompressedKV(self, key_states, value_states, self.length)
        return self._pending, self._pending

    def get_seq_length(self) -> int:
        """Tokens of each sequence so far, padding included."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask of ``query_length`` more tokens."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """max_length; -1: none."""
        return -1 if self.cache.max_length is None else self.cache.max_length

    def reset(self) -> None:
        """Forget the tokens of this layer; its pages stay allocated."""
        self.length = 0
        self._pending = None

    def crop(self, tokens_to_remove: int) -> None:
        """Not for one layer."""
        self._whole_cache("crop")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Not for one layer."""
        self._whole_cache("reorder_cache")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not for one layer."""
        self._whole_cache("batch_repeat_interleave")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Not for one layer."""
        self._whole_cache("batch_select_indices")

    def offload(self) -> None:
        """Not supported."""
        _no_offloading()

    def prefetch(self) -> None:
        """Not supported."""
        _no_offloading()

    def _whole_cache(self, name: str) -> NoReturn:
        raise RuntimeError(f"{name}: call it on the TQ4Cache; its layers share their pages' bookkeeping")

    # ---- Storage and attention.

    @property
    def nbytes(self) -> int:
        """Bytes of the pages."""
        return 0 if self.pool is None else self.pool.nbytes

    def copy_pages(self, copies: list[tuple[int, int]]) -> None:
        """Copy whole pages, (from, to)."""
        if not copies or self.pool is None:
            return
        self._grow()
        pages = torch.tensor(copies, dtype=torch.int64, device="cpu").T.to(self.device, non_blocking=True)
        tensor = self.pool.tensor
        tensor.index_copy_(0, pages[1], tensor.index_select(0, pages[0]))

    def attend(
        self,
        handle: CompressedKV,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        folded_v: bool,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Store the fresh K and V, and attend to all pages.

        Args:
            handle: what :meth:`update` returned for these queries.
            query: ``[B, Hq, T, D]`` fp16 or bf16.
            mask: bool ``[B, columns]``, which columns are tokens; None: all.
            folded_v: V comes rotated, and the output stays so (:func:`fold_rotation`).
            scale, window, softcap, sinks: as in :func:`tq4.prefill`; window counts the query's own position.

        Returns:
            ``[B, T, Hq, D]``, contiguous.
        """
        batch, heads, tokens, head_dim = query.shape
        step = self.cache.paging.step(mask, query.device)
        if not handle.stored:
            self._store(handle, step, folded_v)
        q = query.transpose(1, 2).reshape(batch * tokens, heads, head_dim)
        if step.order is not None:
            q = q.index_select(0, step.order)
        options = {
            "sm_scale": scale,
            "window": (-1 if window is None else window - 1, -1),
            "softcap": softcap or 0.0,
            "sinks": sinks,
            "rotate_out": not folded_v,
            "int8": self.cache.int8,
            "max_query_len": tokens,
            "backend": self.cache.backend,
        }
        pages = (self.pool, step.block_table, step.seq_lens)
        starts = step.query_start_loc
        group = heads // self.num_kv_heads
        if tokens == 1:
            out = decode(q, *pages, self.quantizer, **options)
        elif tokens <= _DECODE_TOKENS and tokens * group <= _DECODE_ROWS:
            out = decode(q, *pages, self.quantizer, query_start_loc=starts, **options)
        else:
            out = prefill(q, *pages, starts, self.quantizer, **options)
        if step.order is not None:
            out = torch.empty_like(out).index_copy_(0, step.order, out)
        return out.view(batch, tokens, heads, head_dim)

    def store_only(self, handle: CompressedKV, mask: torch.Tensor | None, folded_v: bool) -> bool:
        """Store the fresh K and V; returns whether they are the sequences' first tokens."""
        step = self.cache.paging.step(mask, handle.device)
        if not handle.stored:
            self._store(handle, step, folded_v)
        return step.first

    def _store(self, handle: CompressedKV, step: Step, folded_v: bool) -> None:
        self._grow()
        key = handle.key.transpose(1, 2).flatten(0, 1)
        value = handle.value.transpose(1, 2).flatten(0, 1)
        store(
            key,
            value.to(key.dtype),
            self.pool,
            step.slots,
            self.quantizer,
            rotate_v=not folded_v,
            backend=self.cache.backend,
        )
        handle.stored = True
        self._pending = None

    def _grow(self) -> None:
        """A pool of as many pages as the bookkeeping hands out; what is stored stays at its place."""
        blocks = self.cache.paging.num_blocks
        if self.pool is not None and self.pool.num_blocks >= blocks:
            return
        pool = PagedCache(
            blocks,
            self.num_kv_heads,
            self.head_dim,
            block_size=self.cache.page_size,
            layout=self.cache.layout,
            device=self.device,
        )
        if self.pool is not None:
            pool.tensor[: self.pool.num_blocks].copy_(self.pool.tensor)
        self.pool = pool


class TQ4Cache(Cache):
    """A cache for ``model.generate(..., past_key_values=TQ4Cache(model.config))``.

    Full-attention layers are stored in TQ4 pages, at 4 bits a coordinate, and attended to without being
    decompressed; other layers (sliding, linear, ...) stay dense as the library has them.  The model must use
    the
    attention function: ``model.set_attn_implementation("tq4")``.

    Head counts, head_dim, dtype and device are those of the tensors that come, so each rank of a
    tensor-parallel model caches its own heads.  Not thread-safe; one cache for one model.  After a forward
    call that failed half-way, :meth:`reset` it.

    Args:
        config: the model's config, or the model (which is then checked to be one that works).
        rotation: "hadamard" (Haar where head_dim is no power of two), "haar", or an orthogonal ``[D, D]``.
        seed: of the rotation.
        norm_correction: decoded vectors keep their exact length.
        dense_first, dense_last: this many layers at each end stay dense.
        first_chunk: what a sequence's first tokens attend to: "compressed" (the pages; the answer does not
            depend on how the prompt is cut into chunks) or "dense" (their own exact K and V).
        page_size: tokens a page, a multiple of 16.
        layout: of the pages, "token_major" or "head_major".
        max_length: most tokens of a sequence, whose pages are allocated at once, at the first call; default:
            pages are added as needed.
        int8: as in :func:`tq4.prefill` and :func:`tq4.decode`; False is more exact and slower.
        backend: as in :func:`tq4.prefill`; default: the one in force.
        bits: 4.
        offloading: False.

    Attributes:
        paging: the pages' bookkeeping.

    Raises:
        TypeError: config is neither a config nor a model.
        ValueError: an option, or something of the model, is not supported; the message names it.
    """

    #: Of its full-attention layers; a subclass may watch them.
    layer_class = TQ4Layer

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        *,
        rotation: Rotation = "hadamard",
        seed: int = 42,
        norm_correction: bool = False,
        dense_first: int = 0,
        dense_last: int = 0,
        first_chunk: str = _COMPRESSED,
        page_size: int = 16,
        layout: str = TOKEN_MAJOR,
        max_length: int | None = None,
        int8: bool = True,
        backend: str | None = None,
        bits: int = _BITS,
        offloading: bool = False,
    ) -> None:
        config = _checked_config(config)
        if bits != _BITS:
            raise ValueError(f"bits: TQ4 has {_BITS}, got {bits}")
        if offloading:
            _no_offloading()
        if rotation is None:
            raise ValueError("rotation: a model's keys are not rotated, expected a rotation, got None")
        if first_chunk not in (_COMPRESSED, _DENSE):
            raise ValueError(f"first_chunk: expected 'compressed' or 'dense', got {first_chunk!r}")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length: expected at least 1, got {max_length}")
        for name, count in (("dense_first", dense_first), ("dense_last", dense_last)):
            if count < 0:
                raise ValueError(f"{name}: expected at least 0, got {count}")
        # A throw-away pool checks page_size and layout by the one rule there is.
        PagedCache(1, 1, HEAD_DIMS[0], block_size=page_size, layout=layout)
        self.rotation = rotation
        self.seed = seed
        self.norm_correction = norm_correction
        self.first_chunk = first_chunk
        self.page_size = page_size
        self.layout = layout
        self.max_length = max_length
        self.int8 = int8
        self.backend = backend
        self.paging = Paging(page_size, max_length)
        self._quantizers: dict[tuple[int, torch.device], Quantizer] = {}
        layers = DynamicCache(config=config).layers
        count = len(layers)
        for index, layer in enumerate(layers):
            # Subclasses hold more than K and V (linear states, indexers) and stay what they are.
            if type(layer) is DynamicLayer and dense_first <= index < count - dense_last:
                layers[index] = self.layer_class(self, index)
        super().__init__(layers=layers)

    # ---- The interface of a cache, where the layers act together.

    def reset(self) -> None:
        """Forget all sequences; pages stay allocated and are used again."""
        self.paging.reset()
        for layer in self.layers:
            layer.reset()
            # The library zeroes a dynamic layer and keeps its length; a forgotten sequence has none.
            for name in ("keys", "values", "indexer_keys"):
                if isinstance(layer, DynamicLayer) and getattr(layer, name, None) is not None:
                    setattr(layer, name, getattr(layer, name).new_empty(0))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens (0 or negative), padding counted.

        A positive number is, as the library still has it, the length to keep.
        """
        self._require_stored("crop")
        length = self.paging.length
        kept = min(length, tokens_to_remove) if tokens_to_remove > 0 else max(0, length + tokens_to_remove)
        for layer in self.layers:
            if isinstance(layer, TQ4Layer):
                layer.length = kept
            else:
                layer.crop(tokens_to_remove)
        self._copy_pages(self.paging.crop(kept))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Sequence i becomes what sequence ``beam_idx[i]`` was; pages that both have filled are shared."""
        self._require_stored("reorder_cache")
        self._copy_pages(self.paging.reorder(beam_idx))
        for layer in self._dense_layers():
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence; the pages they have filled are shared."""
        self._require_stored("batch_repeat_interleave")
        indices = torch.arange(self.paging.batch, device="cpu").repeat_interleave(repeats)
        self._copy_pages(self.paging.reorder(indices))
        for layer in self._dense_layers():
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some sequences: ``indices`` int ``[n]`` or bool ``[B]``."""
        self._require_stored("batch_select_indices")
        chosen = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self._copy_pages(self.paging.reorder(chosen))
        for layer in self._dense_layers():
            layer.batch_select_indices(indices)

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Not supported."""
        _no_offloading()

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Not supported."""
        _no_offloading()

    # ---- What it holds.

    @property
    def tq4_layers(self) -> list[TQ4Layer]:
        """The layers in TQ4 pages."""
        return [layer for layer in self.layers if isinstance(layer, TQ4Layer)]

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds: all allocated pages, and the K and V of dense layers."""
        dense = sum(
            tensor.nbytes
            for layer in self._dense_layers()
            for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if tensor is not None
        )
        return dense + sum(layer.nbytes for layer in self.tq4_layers)

    def quantizer(self, head_dim: int, device: torch.device) -> Quantizer:
        """The quantiser of a head_dim on a device, made once."""
        if (head_dim, device) not in self._quantizers:
            self._quantizers[head_dim, device] = Quantizer(
                head_dim,
                rotation=self.rotation,
                seed=self.seed,
                norm_correction=self.norm_correction,
                device=device,
            )
        return self._quantizers[head_dim, device]

    def _dense_layers(self) -> list[CacheLayerMixin]:
        return [layer for layer in self.layers if not isinstance(layer, TQ4Layer)]

    def _copy_pages(self, copies: list[tuple[int, int]]) -> None:
        for layer in self.tq4_layers:
            layer.copy_pages(copies)

    def _require_stored(self, name: str) -> None:
        for layer in self.tq4_layers:
            if layer._pending is not None:
                raise RuntimeError(
                    f"{name}: the last keys and values of layer {layer.index} never reached the attention "
                    "function "
                    '"tq4"; call model.set_attn_implementation("tq4"), and reset() the cache'
                )


def _checked_config(config: PreTrainedConfig | PreTrainedModel) -> PreTrainedConfig:
    """The decoder's config, of a model that can work."""
    if isinstance(config, PreTrainedModel):
        if not config._can_set_attn_implementation():
            raise ValueError(
                f"config: the attention of {type(config).__name__} does not go through transformers' "
                "AttentionInterface, so TQ4Cache cannot serve it"
            )
        config = config.config
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(f"config: expected a model or its config, got {type(config).__name__}")
    config = config.get_text_config(decoder=True)
    if config.model_type in _ALIBI_MODELS or getattr(config, "alibi", False):
        raise ValueError(f"config: ALiBi position biases ({config.model_type}) are not supported by TQ4Cache")
    if getattr(config, "position_embedding_type", None) == "alibi":
        raise ValueError("config: position_embedding_type='alibi' is not supported by TQ4Cache")
    return config


def _no_offloading() -> NoReturn:
    raise ValueError(
        "offloading: TQ4Cache stays on the GPU (its pages are 3.8 times smaller than fp16); it cannot be "
        "offloaded"
    )
