"""torch.compile(fullgraph=True) over every op and every public function; eager and compiled agree exactly."""

from __future__ import annotations

import pytest
import torch

import tq4
from support import make_case
from test_ops import MUTATED, OPS, op_arguments
from tq4.compat import turboquant_vllm as compat
from tq4.layout import HEAD_MAJOR, TOKEN_MAJOR


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, dynamic: bool | None = None):
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)


@pytest.mark.parametrize("dynamic", (False, True))
@pytest.mark.parametrize("name", OPS)
def test_ops(name, dynamic):
    op = getattr(torch.ops.tq4, name)
    first, second = op_arguments(name), op_arguments(name)
    op(*first)
    compiled(lambda *arguments: op(*arguments), dynamic)(*second)
    for argument, a, b in zip(op.default._schema.arguments, first, second, strict=False):
        if argument.name in MUTATED[name]:
            assert torch.equal(a, b) and a.any()


@pytest.mark.parametrize("layout", (TOKEN_MAJOR, HEAD_MAJOR))
def test_store_and_gather(layout):
    key, value = torch.randn(2, 20, 2, 64).half()
    quantizer = tq4.Quantizer(64)
    lens = torch.tensor([20], dtype=torch.int32)

    def step(key, value, cache, slots, table, lens):
        tq4.store(key, value, cache, slots, quantizer, rotate_v=False)
        return tq4.gather(cache, table, lens, quantizer, total=20, rotate_v=False)

    results = []
    for function in (step, compiled(step)):
        cache = tq4.PagedCache(3, 2, 64, layout=layout)
        blocks = cache.allocate(2)
        arguments = (cache.slots(blocks, 0, 20), cache.block_table([blocks]), lens)
        results.append((*function(key, value, cache, *arguments), cache.tensor))
    for eager, graph in zip(*results, strict=True):
        assert torch.equal(eager, graph) and eager.any()


def test_compress_and_decompress():
    quantizer = tq4.Quantizer(64, norm_correction=True)

    def round_trip(x):
        packed, norms = tq4.compress(x, quantizer, which="v")
        return tq4.decompress(packed, norms, quantizer, which="v", dtype=torch.bfloat16)

    x = torch.randn(5, 2, 64)
    assert torch.equal(compiled(round_trip)(x), round_trip(x))
    # A second shape, which makes dynamo try dynamic sizes.
    x = torch.randn(9, 2, 64)
    assert torch.equal(compiled(round_trip)(x), round_trip(x))


@pytest.mark.parametrize("op", ("prefill", "decode"))
def test_attention(op):
    options = {
        "window": (9, -1),
        "softcap": 5.0,
        "sinks": torch.linspace(-1, 1, 4),
        "sm_scale": 0.2,
        "return_lse": True,
    }
    function = compiled(lambda case, **extra: case.attend(op=op, **extra))
    for layout in (TOKEN_MAJOR, HEAD_MAJOR):
        case = make_case(head_dim=64, kv_lens=(20, 5), q_lens=(3, 1), layout=layout)
        assert torch.equal(function(case), case.attend(op=op))
        eager, graph = case.attend(op=op, **options), function(case, **options)
        assert torch.equal(eager[0], graph[0]) and torch.equal(eager[1], graph[1])
        out = torch.zeros_like(case.q)
        assert torch.equal(function(case, out=out), case.attend(op=op)) and out.any()


def test_attention_of_rotated_strided_queries_in_a_model():
    case = make_case(head_dim=64, kv_lens=(20,), q_lens=(4,))

    def layer(x):
        # Not contiguous in the last dimension, and consumed afterwards.
        q = (x * 2).transpose(1, 2).contiguous().transpose(1, 2)
        out = case.attend(q=q, rotate_q=False, rotate_out=False, int8=False)
        return out.float().relu().sum(-1)

    assert torch.equal(compiled(layer)(case.q), layer(case.q))


def test_decode_of_one_token_a_sequence():
    case = make_case(head_dim=64, kv_lens=(20, 3), q_lens=(1, 1))

    def step(q):
        return tq4.decode(q, case.cache, case.block_table, case.seq_lens, case.quantizer, num_kv_heads=2)

    assert torch.equal(compiled(step)(case.q), step(case.q))


def test_the_backend_is_chosen_when_the_graph_runs():
    case = make_case(head_dim=64, kv_lens=(20,), q_lens=(1,))
    function = compiled(lambda q: case.attend(q=q))
    expected = function(case.q)
    with tq4.backend("reference"):
        assert torch.equal(function(case.q), expected)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="cannot run on cpu"):
            compiled(lambda q: case.attend("cuda", q=q))(case.q)


@pytest.mark.parametrize("name", ("fused_paged_tq4_int8_prefill", "fused_paged_tq4_decode"))
def test_compat_attention(name):
    case = make_case(kv_lens=(20,), q_lens=(1,), rotation="haar")
    function = getattr(compat, name)
    quantizer = case.quantizer
    arguments = (
        case.q,
        case.cache,
        case.block_table,
        case.seq_lens,
        quantizer.k_centroids,
        quantizer.k_rotation,
        2,
        128,
        16,
    )
    expected = function(*arguments)
    assert torch.equal(compiled(function)(*arguments), expected)
    out = torch.zeros_like(case.q)
    assert torch.equal(compiled(function)(*arguments, out=out), expected) and torch.equal(out, expected)


def test_compat_compress_and_decompress():
    quantizer = tq4.Quantizer(64, rotation="haar")
    transposed = quantizer.k_rotation.T
    even, odd = transposed[:, 0::2].contiguous(), transposed[:, 1::2].contiguous()

    def round_trip(x):
        packed, norms = compat.tq4_compress(x, even, odd, quantizer.k_boundaries)
        return packed, norms, compat.tq4_decompress(packed, norms, quantizer.k_centroids, torch.float32)

    x = torch.randn(3, 2, 64)
    for eager, graph in zip(round_trip(x), compiled(round_trip)(x), strict=True):
        assert torch.equal(eager, graph)


def test_compat_opcheck():
    case = make_case(kv_lens=(20,), q_lens=(1,))
    quantizer = case.quantizer
    out = torch.zeros_like(case.q)
    tables = (case.block_table, case.seq_lens, quantizer.k_centroids, quantizer.k_rotation)
    for decode in (True, False):
        torch.library.opcheck(
            torch.ops.tq4_compat.attention.default, (case.q, case.cache, *tables, out, 2, 0.1, decode)
        )
