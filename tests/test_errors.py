"""Bad input: each case raises a TypeError or ValueError that names the argument, and nothing has been
written.

Every case starts from a good call of an op and breaks one argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import tq4
from support import make_case
from tq4 import checks, dispatch
from tq4.layout import HEAD_MAJOR

POISON = 7


def good(name: str, head_dim: int = 64) -> dict:
    """Arguments of a good call; the tensors that are written hold POISON."""
    case = make_case(head_dim=head_dim, kv_lens=(20, 5), q_lens=(1, 1) if name == "decode" else (3, 2))
    quantizer = case.quantizer
    rotation = quantizer.k_rotation
    if name == "store":
        case.cache.fill_(POISON)
        return {
            "key": case.key,
            "value": case.value,
            "cache": case.cache,
            "slot_mapping": case.slot_mapping,
            "k_rotation": rotation,
            "v_rotation": rotation,
            "k_centroids": quantizer.k_centroids,
            "k_boundaries": quantizer.k_boundaries,
            "v_centroids": quantizer.v_centroids,
            "v_boundaries": quantizer.v_boundaries,
        }
    if name == "gather":
        return {
            "cache": case.cache,
            "block_table": case.block_table,
            "seq_lens": case.seq_lens,
            "out_start_loc": torch.tensor([0, 20, 25], dtype=torch.int32),
            "k_rotation": rotation,
            "v_rotation": rotation,
            "k_centroids": quantizer.k_centroids,
            "v_centroids": quantizer.v_centroids,
            "key": torch.full((25, 2, head_dim), float(POISON)),
            "value": torch.full((25, 2, head_dim), float(POISON)),
        }
    if name == "compress":
        return {
            "x": case.key,
            "rotation": rotation,
            "centroids": quantizer.k_centroids,
            "boundaries": quantizer.k_boundaries,
            "packed": torch.full((25, 2, head_dim // 2), POISON, dtype=torch.uint8),
            "norms": torch.full((25, 2, 1), float(POISON)),
        }
    if name == "decompress":
        return {
            "packed": torch.zeros(25, 2, head_dim // 2, dtype=torch.uint8),
            "norms": torch.ones(25, 2, 1),
            "rotation": rotation,
            "centroids": quantizer.k_centroids,
            "out": torch.full((25, 2, head_dim), float(POISON)),
        }
    return {
        "q": case.q,
        "cache": case.cache,
        "block_table": case.block_table,
        "seq_lens": case.seq_lens,
        "query_start_loc": case.query_start_loc,
        "q_rotation": rotation,
        "out_rotation": rotation,
        "k_centroids": quantizer.k_centroids,
        "k_codes": quantizer.k_codes,
        "k_code_scale": quantizer.k_code_scale,
        "v_centroids": quantizer.v_centroids,
        "out": torch.full_like(case.q, POISON),
        "lse": torch.full((4, len(case.q)), float(POISON)),
        "sinks": torch.zeros(4),
        "num_kv_heads": 2,
        "sm_scale": 0.125,
    }


WRITTEN = {
    "store": ("cache",),
    "gather": ("key", "value"),
    "compress": ("packed", "norms"),
    "decompress": ("out",),
    "prefill": ("out", "lse"),
    "decode": ("out", "lse"),
}


def call(name: str, arguments: dict) -> None:
    getattr(torch.ops.tq4, name)(**arguments)


@pytest.mark.parametrize("name", WRITTEN)
def test_the_good_calls_are_good(name):
    arguments = good(name)
    call(name, arguments)
    for written in WRITTEN[name]:
        assert not (arguments[written] == POISON).all()


def wide(x: torch.Tensor) -> torch.Tensor:
    """The same numbers with a last dimension of stride 2."""
    return torch.stack([x, x], -1)[..., 0]


def meta(x: torch.Tensor) -> torch.Tensor:
    """The same tensor on another device."""
    return x.to("meta")


def cut(x: torch.Tensor) -> torch.Tensor:
    """One row less."""
    return x[:-1]


def shifted_bytes(x: torch.Tensor) -> torch.Tensor:
    """The same shape at an address that is not a multiple of 4."""
    flat = torch.zeros(x.numel() + 8, dtype=torch.uint8)
    return flat[(1 - flat.data_ptr()) % 4 :][: x.numel()].view(x.shape)


def of(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x.to(dtype)


def value(number: object) -> Callable[[object], object]:
    return lambda _: number


def ints(*numbers: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: torch.tensor(numbers, dtype=x.dtype)


def at(index: tuple, number: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[index] = number
        return x

    return change


# (ops, argument, what is done to it, error, what the message says)
CASES: list[tuple[str, str, Callable, type[Exception], str]] = [
    # dtypes
    ("store", "key", of(torch.float64), TypeError, "float16 or bfloat16 or float32, got float64"),
    ("store", "key", of(torch.int32), TypeError, "got int32"),
    ("store", "value", of(torch.bfloat16), TypeError, "the dtype of key"),
    ("store gather prefill decode", "cache", of(torch.int8), TypeError, "expected dtype uint8, got int8"),
    ("store", "slot_mapping", of(torch.int32), TypeError, "expected dtype int64, got int32"),
    ("store", "k_rotation", of(torch.float16), TypeError, "expected dtype float32"),
    ("store", "v_rotation", of(torch.float64), TypeError, "expected dtype float32"),
    ("store prefill decode", "k_centroids", of(torch.float64), TypeError, "expected dtype float32"),
    ("store", "v_boundaries", of(torch.float16), TypeError, "expected dtype float32"),
    ("gather prefill decode", "block_table", of(torch.int64), TypeError, "expected dtype int32, got int64"),
    ("gather prefill decode", "seq_lens", of(torch.int64), TypeError, "expected dtype int32, got int64"),
    ("gather", "out_start_loc", of(torch.int64), TypeError, "expected dtype int32"),
    ("gather", "value", of(torch.float16), TypeError, "the dtype of key"),
    ("prefill decode", "query_start_loc", of(torch.int64), TypeError, "expected dtype int32"),
    ("prefill decode", "q", of(torch.float32), TypeError, "float16 or bfloat16, got float32"),
    ("prefill decode", "q", of(torch.float64), TypeError, "got float64"),
    ("prefill decode", "out", of(torch.bfloat16), TypeError, "the dtype of q"),
    ("prefill decode", "lse", of(torch.float16), TypeError, "expected dtype float32"),
    ("prefill decode", "sinks", of(torch.float16), TypeError, "expected dtype float32"),
    ("prefill decode", "k_codes", of(torch.int32), TypeError, "expected dtype int8"),
    ("compress", "x", of(torch.int8), TypeError, "got int8"),
    ("compress decompress", "packed", of(torch.int8), TypeError, "expected dtype uint8"),
    ("compress decompress", "norms", of(torch.float16), TypeError, "expected dtype float32"),
    ("decompress", "out", of(torch.float64), TypeError, "got float64"),
    # shapes
    ("store", "key", lambda x: x[0], ValueError, r"expected 3 dimensions"),
    ("store", "key", lambda x: torch.zeros(25, 2, 80), ValueError, "head_dim of 64, 96, 128, 256, got 80"),
    ("store", "key", lambda x: x[:, :0], ValueError, "at least one head"),
    ("store", "value", cut, ValueError, "expected the shape of key"),
    ("store", "slot_mapping", cut, ValueError, r"expected shape \[num_tokens\] = \[25\], got \[24\]"),
    ("store prefill decode", "k_centroids", cut, ValueError, r"expected shape \[16\]"),
    ("store", "k_boundaries", cut, ValueError, r"expected shape \[15\]"),
    ("store", "k_rotation", cut, ValueError, r"expected shape \[head_dim, head_dim\] = \[64, 64\]"),
    ("store gather prefill decode", "cache", lambda x: x[0], ValueError, "3-D token-major"),
    ("store gather prefill decode", "cache", lambda x: x[..., :-4], ValueError, "last dimension of at least"),
    ("store gather prefill decode", "cache", lambda x: x[:, :8], ValueError, "multiple of 16, got 8"),
    (
        "store prefill",
        "cache",
        lambda x: x[:, None, :, :72],
        ValueError,
        r"\[num_blocks, 2, block_size, 72\]",
    ),
    ("gather prefill decode", "block_table", lambda x: x[0], ValueError, r"shape \[num_seqs, max_blocks\]"),
    ("gather prefill decode", "block_table", cut, ValueError, "num_seqs = 2"),
    ("gather prefill decode", "seq_lens", lambda x: x[:, None], ValueError, r"expected shape \[num_seqs\]"),
    ("gather prefill decode", "seq_lens", lambda x: x[:0], ValueError, "got an empty batch"),
    ("gather", "out_start_loc", cut, ValueError, r"\[num_seqs \+ 1\] = \[3\]"),
    ("gather", "value", cut, ValueError, "expected the shape of key"),
    ("prefill decode", "query_start_loc", cut, ValueError, r"\[num_seqs \+ 1\] = \[3\], got \[2\]"),
    ("prefill decode", "q", lambda x: x[0], ValueError, "expected 3 dimensions"),
    ("prefill decode", "q", lambda x: x[..., :32], ValueError, "head_dim of 64, 96, 128, 256, got 32"),
    ("prefill decode", "out", cut, ValueError, "expected the shape of q"),
    ("prefill decode", "out", lambda x: x[:, :2], ValueError, "expected the shape of q"),
    ("prefill decode", "lse", lambda x: x.T.contiguous(), ValueError, r"\[num_q_heads, num_tokens\]"),
    ("prefill decode", "sinks", cut, ValueError, r"\[num_q_heads\] = \[4\], got \[3\]"),
    ("prefill decode", "q_rotation", cut, ValueError, r"\[head_dim, head_dim\]"),
    ("prefill decode", "out_rotation", cut, ValueError, r"\[head_dim, head_dim\]"),
    ("prefill decode", "k_codes", cut, ValueError, r"expected shape \[16\]"),
    ("compress", "packed", cut, ValueError, r"\[N, H, D / 2\] = \[25, 2, 32\]"),
    ("compress decompress", "norms", lambda x: x[..., 0], ValueError, r"\[N, H, 1\] = \[25, 2, 1\]"),
    ("decompress", "packed", lambda x: x[..., :16], ValueError, r"\[N, H, D / 2\]"),
    # head counts
    ("prefill decode", "num_kv_heads", value(3), ValueError, "a divisor of the 4 query heads of q, got 3"),
    ("prefill decode", "num_kv_heads", value(0), ValueError, "at least 1, got 0"),
    ("prefill decode", "num_kv_heads", value(-2), ValueError, "at least 1, got -2"),
    # strides and addresses
    ("store", "key", wide, ValueError, "contiguous last dimension"),
    ("store", "value", wide, ValueError, "contiguous last dimension"),
    ("store", "slot_mapping", wide, ValueError, "expected a contiguous tensor"),
    ("store gather prefill decode", "cache", wide, ValueError, "contiguous last dimension"),
    ("store gather prefill decode", "cache", shifted_bytes, ValueError, "aligned to 4 bytes"),
    ("store", "k_rotation", lambda x: x.T, ValueError, "expected a contiguous tensor"),
    ("gather", "key", wide, ValueError, "contiguous last dimension"),
    ("gather", "value", lambda x: x[:1].expand(25, 2, 64), ValueError, "rows that do not overlap"),
    ("gather prefill decode", "block_table", wide, ValueError, "contiguous last dimension"),
    ("gather prefill decode", "seq_lens", wide, ValueError, "expected a contiguous tensor"),
    ("prefill decode", "q", wide, ValueError, "contiguous last dimension"),
    ("prefill decode", "out", wide, ValueError, "contiguous last dimension"),
    ("prefill decode", "out", lambda x: x[:, :1].expand(x.shape), ValueError, "rows that do not overlap"),
    ("prefill decode", "lse", wide, ValueError, "expected a contiguous tensor"),
    ("decompress", "out", wide, ValueError, "contiguous last dimension"),
    ("compress", "packed", wide, ValueError, "expected a contiguous tensor"),
    # numbers
    ("prefill decode", "sm_scale", value(0.0), ValueError, "finite number > 0, got 0.0"),
    ("prefill decode", "sm_scale", value(math.nan), ValueError, "finite number > 0, got nan"),
    ("prefill decode", "k_code_scale", value(-1.0), ValueError, "finite number > 0"),
    ("prefill decode", "softcap", value(-1.0), ValueError, "finite number >= 0"),
    ("prefill decode", "softcap", value(math.inf), ValueError, "finite number >= 0"),
    ("prefill decode", "window_left", value(-2), ValueError, "-1 .unlimited. or more, got -2"),
    ("prefill decode", "window_right", value(-5), ValueError, "-1 .unlimited. or more, got -5"),
    ("prefill", "max_query_len", value(-2), ValueError, "-1 = unknown"),
    ("prefill", "max_query_len", value(2), ValueError, "at least 3, the longest query"),
    ("decode", "max_query_len", value(0), ValueError, "at least 1 for decode, got 0"),
    ("decode", "query_start_loc", ints(0, 2, 2), ValueError, ""),
    # devices: a meta tensor stands for another device (with a GPU, test_device_mix_on_a_gpu uses the real
    # one)
    ("store", "value", meta, ValueError, "expected device cpu .that of key., got meta"),
    ("store", "slot_mapping", meta, ValueError, "expected device cpu"),
    ("store", "k_rotation", meta, ValueError, "expected device cpu"),
    ("store", "v_boundaries", meta, ValueError, "expected device cpu"),
    ("gather", "block_table", meta, ValueError, "expected device cpu .that of cache., got meta"),
    ("gather", "value", meta, ValueError, "expected device cpu"),
    ("compress", "norms", meta, ValueError, "expected device cpu .that of x., got meta"),
    ("decompress", "centroids", meta, ValueError, "expected device cpu .that of packed., got meta"),
    ("prefill decode", "seq_lens", meta, ValueError, "expected device cpu .that of q., got meta"),
    ("prefill decode", "query_start_loc", meta, ValueError, "expected device cpu"),
    ("prefill decode", "out", meta, ValueError, "expected device cpu"),
    ("prefill decode", "lse", meta, ValueError, "expected device cpu"),
    ("prefill decode", "sinks", meta, ValueError, "expected device cpu"),
    ("prefill decode", "q_rotation", meta, ValueError, "expected device cpu"),
]

# Rotations as signs [D].
SIGNS = [
    (op, argument, change, ValueError, message)
    for op, argument in (
        ("store gather", "k_rotation"),
        ("store gather", "v_rotation"),
        ("compress decompress", "rotation"),
        ("prefill decode", "q_rotation"),
        ("prefill decode", "out_rotation"),
    )
    for change, message in (
        (lambda x: torch.ones(63), r"expected shape \[head_dim\] = \[64\], got \[63\]"),
        (lambda x: torch.ones(128)[::2], "expected a contiguous tensor"),
        (lambda x: torch.ones(64, device="meta"), "expected device cpu"),
    )
]

# Contents, where they are known on the host: CPU tensors, or TQ4_DEBUG=1.
CONTENTS: list[tuple[str, str, Callable, type[Exception], str]] = [
    (
        "prefill decode",
        "query_start_loc",
        ints(0, 2, 1),
        ValueError,
        "non-decreasing entries, got 2 then 1 at",
    ),
    ("prefill decode", "query_start_loc", ints(1, 1, 2), ValueError, "to start with 0, got 1"),
    ("prefill", "query_start_loc", ints(0, 3, 6), ValueError, r"at most 5 \(tokens of q\), got 6"),
    ("gather", "out_start_loc", ints(0, 25, 20), ValueError, "non-decreasing"),
    ("gather", "out_start_loc", ints(0, 20, 26), ValueError, r"at most 25 \(rows of key\), got 26"),
    ("gather", "out_start_loc", ints(0, 19, 25), ValueError, "room for the 20 tokens of sequence 0, got 19"),
    ("gather prefill decode", "seq_lens", ints(20, -1), ValueError, "got -1 for sequence 1"),
    ("gather prefill decode", "seq_lens", ints(500, 5), ValueError, "got 500 for sequence 0"),
    ("gather prefill decode", "block_table", at((0, 1), 1000), ValueError, r"got 1000 at \[0, 1\]"),
    ("gather prefill decode", "block_table", at((1, 0), -1), ValueError, r"got -1 at \[1, 0\]"),
    ("prefill decode", "k_codes", at((15,), 127), ValueError, r"codes -126 .. 126, got 127 at index 15"),
    ("prefill decode", "k_codes", at((0,), -128), ValueError, "got -128 at index 0"),
    ("store", "slot_mapping", at((3,), 10**6), ValueError, "got 1000000 at index 3"),
    ("store", "slot_mapping", at((24,), -2), ValueError, "got -2 at index 24"),
    ("store", "slot_mapping", lambda x: x - x + 5, ValueError, "expected distinct slots, got slot 5 twice"),
]
CONTENTS += [
    (op, argument, lambda x: at((7,), 0.125)(torch.ones(64)), ValueError, r"\+1 or -1, got 0.125 at index 7")
    for op, argument, *_ in SIGNS[::3]
]


def flat(cases: list[tuple[str, str, Callable, type[Exception], str]]) -> dict:
    """Arguments of parametrize, one case for each op."""
    rows = [(op, *case[1:]) for case in cases for op in case[0].split()]
    return {
        "argnames": ("name", "argument", "change", "error", "message"),
        "argvalues": rows,
        "ids": [f"{i}-{row[0]}-{row[1]}" for i, row in enumerate(rows)],
    }


def run_checked(name: str, arguments: dict) -> None:
    """The op, or its check where a meta tensor would send the op to its fake."""
    if not any(isinstance(x, torch.Tensor) and x.device.type == "meta" for x in arguments.values()):
        call(name, arguments)
        return
    if name in ("prefill", "decode"):
        options = {"window_left": -1, "window_right": -1, "softcap": 0.0, "max_query_len": -1}
        checks.check_attention(**arguments, **options)
    else:
        getattr(checks, f"check_{name}")(**arguments)


@pytest.mark.parametrize(**flat(CASES + SIGNS + CONTENTS))
def test_bad_argument(name, argument, change, error, message):
    arguments = good(name)
    before = {written: arguments[written].clone() for written in WRITTEN[name]}
    tensors = {written: arguments[written] for written in WRITTEN[name]}
    arguments[argument] = change(arguments.get(argument))
    # A query_start_loc that gives one sequence two tokens breaks the promise of max_query_len.
    named = "max_query_len" if (name, message) == ("decode", "") else argument
    with pytest.raises(error, match=f"^{named}: .*{message}"):
        run_checked(name, arguments)
    for written, tensor in tensors.items():
        assert torch.equal(
            tensor,
            before[written],
        ), f"{written} was written"


@pytest.mark.parametrize("name", WRITTEN)
def test_96_dimensions_have_no_signs(name):
    for argument, value in good(name, head_dim=96).items():
        if argument.endswith("rotation"):
            assert value.shape == (96, 96)
            with pytest.raises(ValueError, match=rf"^{argument}: expected a matrix .* = \[96, 96\], as only"):
                call(name, good(name, head_dim=96) | {argument: torch.ones(96)})


def test_prefill_needs_query_start_loc():
    arguments = good("decode") | {"query_start_loc": None}
    call("decode", arguments)
    with pytest.raises(ValueError, match="^q: expected one token for each of the 2 sequences"):
        call("decode", good("prefill") | {"query_start_loc": None})


def test_out_must_not_be_q():
    for name in ("prefill", "decode"):
        arguments = good(name)
        arguments["out"] = arguments["q"]
        with pytest.raises(ValueError, match="^out: expected memory of its own"):
            call(name, arguments)


def test_head_major_cache_with_another_number_of_heads():
    case = make_case(head_dim=64, kv_lens=(20,), q_lens=(1,), layout=HEAD_MAJOR)
    with pytest.raises(ValueError, match=r"^cache: expected shape \[num_blocks, 4, block_size, 72\]"):
        case.attend(num_kv_heads=4)


# ---- The functions.


@pytest.fixture
def case():
    return make_case(head_dim=64, kv_lens=(20,), q_lens=(2,))


def test_functions_name_what_is_not_a_tensor(case):
    q, cache, table, lens, starts = case.q, case.cache, case.block_table, case.seq_lens, case.query_start_loc
    quantizer = case.quantizer
    calls = {
        "q": lambda: tq4.prefill([[1.0]], cache, table, lens, starts, quantizer, num_kv_heads=2),
        "cache": lambda: tq4.prefill(q, "cache", table, lens, starts, quantizer, num_kv_heads=2),
        "block_table": lambda: tq4.prefill(q, cache, [[0]], lens, starts, quantizer, num_kv_heads=2),
        "seq_lens": lambda: tq4.prefill(q, cache, table, [20], starts, quantizer, num_kv_heads=2),
        "query_start_loc": lambda: tq4.prefill(q, cache, table, lens, [0, 2], quantizer, num_kv_heads=2),
        "quantizer": lambda: tq4.prefill(q, cache, table, lens, starts, "haar", num_kv_heads=2),
        "out": lambda: tq4.decode(q, cache, table, lens, quantizer, num_kv_heads=2, out=3),
        "key": lambda: tq4.store(None, case.value, cache, case.slot_mapping, quantizer),
        "slot_mapping": lambda: tq4.store(case.key, case.value, cache, [0], quantizer),
        "x": lambda: tq4.compress(3.0, quantizer),
        "packed": lambda: tq4.decompress(b"", torch.ones(1), quantizer),
        "norms": lambda: tq4.decompress(torch.ones(1), None, quantizer),
    }
    for name, function in calls.items():
        with pytest.raises(TypeError, match=f"^{name}: expected"):
            function()


def test_functions_check_the_quantizers_head_dim(case):
    other = tq4.Quantizer(128)
    arguments = (case.cache, case.block_table, case.seq_lens, case.query_start_loc, other)
    with pytest.raises(ValueError, match=r"^q: expected shape \[tokens, heads, 128\]"):
        tq4.prefill(case.q, *arguments, num_kv_heads=2)
    with pytest.raises(ValueError, match=r"^key: expected shape \[tokens, heads, 128\]"):
        tq4.store(case.key, case.value, case.cache, case.slot_mapping, other)
    with pytest.raises(ValueError, match=r"^x: expected shape \[tokens, heads, 128\]"):
        tq4.compress(case.key, other)


def test_number_of_kv_heads(case):
    arguments = (case.block_table, case.seq_lens, case.query_start_loc, case.quantizer)
    with pytest.raises(ValueError, match="^num_kv_heads: expected a number.*raw token-major"):
        tq4.prefill(case.q, case.cache, *arguments)
    cache = tq4.PagedCache.from_tensor(case.cache, 2, 64)
    with pytest.raises(ValueError, match="^num_kv_heads: expected 2, that of the cache, got 4"):
        tq4.prefill(case.q, cache, *arguments, num_kv_heads=4)


def test_which_side(case):
    with pytest.raises(ValueError, match="^which: expected 'k' or 'v', got 'q'"):
        tq4.compress(case.key, case.quantizer, which="q")


def test_gather_out(case):
    arguments = (case.cache, case.block_table, case.seq_lens, case.quantizer)
    for shape, total in (((20, 3, 64), None), ((20, 2, 64), 21)):
        out = (torch.zeros(shape), torch.zeros(shape))
        with pytest.raises(ValueError, match="^out: expected shape"):
            tq4.gather(*arguments, num_kv_heads=2, total=total, out=out)
    with pytest.raises(ValueError, match="^out_start_loc: expected a last entry of at most 19"):
        tq4.gather(*arguments, num_kv_heads=2, total=19)


# ---- TQ4_DEBUG and devices.


def test_debug_is_off_by_default(monkeypatch):
    for text, expected in ((None, False), ("", False), ("0", False), ("1", True)):
        monkeypatch.delenv("TQ4_DEBUG", raising=False)
        if text is not None:
            monkeypatch.setenv("TQ4_DEBUG", text)
        assert dispatch.debug() is expected
        assert checks._contents(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize(**flat(CONTENTS))
def test_debug_checks_contents_on_the_device(name, argument, change, error, message, monkeypatch):
    monkeypatch.setenv("TQ4_DEBUG", "1")
    arguments = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in good(name).items()}
    before = {written: arguments[written].clone() for written in WRITTEN[name]}
    arguments[argument] = change(arguments[argument].cpu()).cuda()
    with pytest.raises(error, match=f"^{argument}: .*{message}"):
        call(name, arguments)
    for written, tensor in before.items():
        assert torch.equal(arguments[written], tensor)


@pytest.mark.gpu
@pytest.mark.parametrize("name", WRITTEN)
def test_device_mix_on_a_gpu(name):
    tensors = [k for k, v in good(name).items() if isinstance(v, torch.Tensor)]
    for argument in tensors:
        # Everything on the GPU but one, and the other way round.
        for first, second in (("cuda", "cpu"), ("cpu", "cuda")):
            arguments = {
                k: v.to(second if k == argument else first) if isinstance(v, torch.Tensor) else v
                for k, v in good(name).items()
            }
            before = {written: arguments[written].clone() for written in WRITTEN[name]}
            with pytest.raises(ValueError, match=r"^\w+: expected device (cpu|cuda:0) .*, got (cpu|cuda:0)"):
                call(name, arguments)
            for written, tensor in before.items():
                assert torch.equal(arguments[written], tensor)
