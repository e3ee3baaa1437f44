"""torch.ops.tq4: schemas, fakes, opcheck; and which backend an op runs on."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import types

import pytest
import torch

import tq4
from support import Case, make_case
from support_attention import on_targets
from tq4 import dispatch, ops
from tq4.backends import cuda as cuda_backend
from tq4.environment import variable
from tq4.layout import HEAD_MAJOR, TOKEN_MAJOR
from tq4.rotation import as_matrix

OPS = ("store", "gather", "compress", "decompress", "prefill", "decode")
MUTATED = {
    "store": {"cache"},
    "gather": {"key", "value"},
    "compress": {"packed", "norms"},
    "decompress": {"out"},
    "prefill": {"out", "lse"},
    "decode": {"out", "lse"},
}
ROTATIONS = ("k_rotation", "v_rotation", "rotation", "q_rotation", "out_rotation")


def op_arguments(name: str, layout: str = TOKEN_MAJOR, lse: bool = True, signs: bool = False) -> tuple:
    """Arguments of an op, all but the ones with defaults, on the CPU; ``signs``: rotations as signs."""
    case = make_case(
        head_dim=64, kv_lens=(20, 5), q_lens=(1, 1) if name == "decode" else (3, 1), layout=layout
    )
    quantizer = case.quantizer
    sides = (quantizer.k_centroids, quantizer.k_boundaries, quantizer.v_centroids, quantizer.v_boundaries)
    rotation = quantizer.k_signs.clone() if signs else quantizer.k_rotation
    if name == "store":
        return (case.key, case.value, case.cache, case.slot_mapping, rotation, None, *sides)
    if name == "gather":
        out = torch.zeros(2, 25, 2, 64)
        starts = torch.tensor([0, 20, 25], dtype=torch.int32)
        tables = (quantizer.k_centroids, quantizer.v_centroids)
        return (case.cache, case.block_table, case.seq_lens, starts, rotation, None, *tables, out[0], out[1])
    packed, norms = torch.zeros(25, 2, 32, dtype=torch.uint8), torch.zeros(25, 2, 1)
    if name == "compress":
        return (case.key, rotation, quantizer.k_centroids, quantizer.k_boundaries, packed, norms)
    if name == "decompress":
        return (packed + 0x37, norms + 2.0, rotation, quantizer.k_centroids, torch.zeros(25, 2, 64))
    return (
        case.q,
        case.cache,
        case.block_table,
        case.seq_lens,
        case.query_start_loc,
        rotation,
        rotation,
        quantizer.k_centroids,
        quantizer.k_codes,
        quantizer.k_code_scale,
        quantizer.v_centroids,
        torch.zeros_like(case.q),
        torch.zeros(4, len(case.q)) if lse else None,
        torch.linspace(-1, 1, 4) if lse else None,
        2,
        0.125,
    )


# ---- Schemas.


@pytest.mark.parametrize("name", OPS)
def test_schema_says_what_is_mutated(name):
    for namespace in (torch.ops.tq4, torch.ops.tq4_cuda):
        schema = getattr(namespace, name).default._schema
        assert not schema.returns
        mutated = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        assert mutated == MUTATED[name]
        assert len({a.alias_info.before_set.pop() for a in schema.arguments if a.alias_info}) == len(mutated)


@pytest.mark.parametrize("name", OPS)
def test_the_two_namespaces_differ_in_the_last_argument_only(name):
    public = [(a.name, str(a.type)) for a in getattr(torch.ops.tq4, name).default._schema.arguments]
    internal = [(a.name, str(a.type)) for a in getattr(torch.ops.tq4_cuda, name).default._schema.arguments]
    assert public[-1] == ("backend", "int")
    expected = public[:-1] + ([("path", "int")] if name in ("prefill", "decode") else [])
    assert internal == expected


def test_defaults():
    defaults = {a.name: a.default_value for a in torch.ops.tq4.prefill.default._schema.arguments}
    assert defaults["causal"] is True and defaults["int8"] is True and defaults["softcap"] == 0.0
    assert defaults["window_left"] == defaults["window_right"] == defaults["max_query_len"] == -1
    arguments = {a.name: a for a in torch.ops.tq4.decode.default._schema.arguments}
    assert arguments["max_query_len"].default_value == 1
    assert str(arguments["query_start_loc"].type) == "Optional[Tensor]"


# ---- opcheck.


@pytest.mark.parametrize("layout", (TOKEN_MAJOR, HEAD_MAJOR))
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, layout):
    torch.library.opcheck(getattr(torch.ops.tq4, name).default, op_arguments(name, layout))


@pytest.mark.parametrize("name", OPS)
def test_opcheck_with_signs(name):
    torch.library.opcheck(getattr(torch.ops.tq4, name).default, op_arguments(name, signs=True))


#: What the CUDA backend computes from a matrix in either case; its other ops transform by the signs, which
#: the tests of store and decode compare.
_BY_MATRIX = ("gather", "decompress", "prefill")


@on_targets()
@pytest.mark.parametrize("name", OPS)
def test_signs_are_the_matrix(name, target):
    target.require()
    if target.backend.startswith("cuda") and name not in _BY_MATRIX:
        pytest.skip("by a transform")
    results = []
    for signs in (False, True):
        arguments = [
            a.to(target.device) if isinstance(a, torch.Tensor) else a for a in op_arguments(name, signs=signs)
        ]
        getattr(torch.ops.tq4, name)(*arguments, backend=tq4.dispatch.backend_id(target.backend))
        names = [a.name for a in getattr(torch.ops.tq4, name).default._schema.arguments]
        results.append([a for n, a in zip(names, arguments, strict=False) if n in MUTATED[name]])
    for matrix, signs in zip(*results, strict=True):
        assert torch.equal(matrix, signs) and matrix.any()


@pytest.mark.parametrize("name", OPS)
def test_the_functions_pass_signs_to_the_ops_with_a_transform(name, monkeypatch):
    """And matrices to the others, or where there are no signs."""
    case = make_case(head_dim=64, kv_lens=(20,), q_lens=(1,))
    seen = []
    module = types.SimpleNamespace(**{name: lambda *args, **kwargs: seen.extend([*args, *kwargs.values()])})
    monkeypatch.setattr(dispatch, "resolve", lambda number, device: (module, {}))
    for rotation in ("hadamard", "haar"):
        quantizer = case.quantizer = tq4.Quantizer(64, rotation=rotation)
        table = (case.cache, case.block_table, case.seq_lens, quantizer)
        seen.clear()
        if name == "store":
            tq4.store(case.key, case.value, case.cache, case.slot_mapping, quantizer)
        elif name == "gather":
            tq4.gather(*table, num_kv_heads=2)
        elif name == "compress":
            tq4.compress(case.key, quantizer, which="v")
        elif name == "decompress":
            packed = torch.zeros(20, 2, 32, dtype=torch.uint8)
            tq4.decompress(packed, torch.ones(20, 2, 1), quantizer, which="v")
        else:
            case.attend(op=name)
        signs = rotation == "hadamard" and name not in _BY_MATRIX
        expected = quantizer.k_signs if signs else quantizer.k_rotation
        assert sum(x is expected for x in seen) == (1 if name in ("compress", "decompress") else 2)
        assert sum(x is quantizer.k_rotation for x in seen) == 0 or not signs


@pytest.mark.parametrize("name", ("prefill", "decode"))
def test_opcheck_without_optional_tensors(name):
    arguments = list(op_arguments(name, lse=False))
    arguments[5] = arguments[6] = None
    if name == "decode":
        arguments[4] = None
    torch.library.opcheck(getattr(torch.ops.tq4, name).default, tuple(arguments))


@pytest.mark.parametrize("name", OPS)
def test_fakes_run_on_meta_tensors(name):
    def to_meta(value):
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    arguments = [to_meta(value) for value in op_arguments(name)]
    assert getattr(torch.ops.tq4, name)(*arguments) is None
    assert getattr(torch.ops.tq4_cuda, name)(*arguments) is None


@pytest.mark.parametrize("name", OPS)
def test_ops_and_functions_write_the_same(name):
    first, second = op_arguments(name), op_arguments(name)
    getattr(torch.ops.tq4, name)(*first)
    getattr(torch.ops.tq4, name)(*second, backend=dispatch.REFERENCE)
    schema = getattr(torch.ops.tq4, name).default._schema
    for argument, a, b in zip(schema.arguments, first, second, strict=False):
        if argument.name in MUTATED[name]:
            assert torch.equal(a, b) and a.any()


def test_empty_calls_do_nothing():
    case = make_case(head_dim=64, kv_lens=(20, 5), q_lens=(0, 0))
    before = case.cache.clone()
    empty = torch.empty(0, 2, 64)
    tq4.store(empty, empty, case.cache, torch.empty(0, dtype=torch.int64), case.quantizer)
    assert torch.equal(case.cache, before)
    out, lse = case.attend(return_lse=True)
    assert out.shape == (0, 4, 64) and lse.shape == (4, 0)
    packed, norms = tq4.compress(empty, case.quantizer)
    assert tq4.decompress(packed, norms, case.quantizer).shape == (0, 2, 64)
    lens = torch.zeros(2, dtype=torch.int32)
    key, _ = tq4.gather(case.cache, case.block_table, lens, case.quantizer, num_kv_heads=2)
    assert key.shape == (0, 2, 64)


def test_a_raw_tensor_and_its_paged_cache_are_the_same_thing():
    case = make_case(head_dim=64, kv_lens=(20,), q_lens=(3,), layout=HEAD_MAJOR)
    wrapped = tq4.PagedCache.from_tensor(case.cache, 2, 64)
    arguments = (case.block_table, case.seq_lens, case.query_start_loc, case.quantizer)
    expected = case.attend()
    assert torch.equal(tq4.prefill(case.q, wrapped, *arguments), expected)
    # A head-major tensor says how many heads it has.
    assert torch.equal(tq4.prefill(case.q, case.cache, *arguments), expected)


def test_out_is_a_plain_contiguous_tensor():
    """Whatever the strides and the class of q."""

    class Other(torch.Tensor):
        pass

    case = make_case(head_dim=64, kv_lens=(20,), q_lens=(3,))
    expected = case.attend()
    transposed = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    for q in (transposed, transposed.as_subclass(Other), torch.nn.Parameter(case.q, requires_grad=False)):
        out = case.attend(q=q)
        assert type(out) is torch.Tensor and out.is_contiguous() and torch.equal(out, expected)


# ---- Dispatch.


@pytest.fixture
def spy(monkeypatch) -> list[str]:
    """Replaces the cuda and triton backends by modules that record calls and may run on the CPU."""
    calls: list[str] = []

    def fake(name: str) -> types.ModuleType:
        module = types.ModuleType(name)
        for op in OPS:
            setattr(
                module, op, lambda *args, op=op, **kwargs: calls.append(f"{name}.{op} {kwargs.get('path')}")
            )
        module.availability = lambda device: (True, "test")
        return module

    for name in ("cuda", "triton"):
        monkeypatch.setitem(sys.modules, f"tq4.backends.{name}", fake(name))
    monkeypatch.setattr(dispatch, "_availability", lambda number, device, interpret: (True, "test"))
    monkeypatch.delenv("TQ4_BACKEND", raising=False)
    return calls


def run_decode(case: Case, **options) -> None:
    case.attend(op="decode", **options)


@pytest.fixture
def case() -> Case:
    return make_case(head_dim=64, kv_lens=(5,), q_lens=(1,))


def test_cpu_tensors_use_the_reference_by_default(spy, case):
    out = case.attend()
    assert spy == [] and out.any()
    assert tq4.get_backend() == "auto"


def test_precedence(spy, case, monkeypatch):
    monkeypatch.setenv("TQ4_BACKEND", "triton")
    assert tq4.get_backend() == "triton"
    run_decode(case)
    tq4.set_backend("cuda")
    run_decode(case)
    with tq4.backend("cuda-sm80"):
        run_decode(case)
        with tq4.backend("triton"):
            assert tq4.get_backend() == "triton"
            run_decode(case)
            run_decode(case, backend="cuda")
            run_decode(case, backend="reference")
        assert tq4.get_backend() == "cuda-sm80"
    run_decode(case)
    tq4.set_backend("auto")
    run_decode(case)
    tq4.set_backend(None)
    run_decode(case)
    assert spy == [
        "triton.decode None",
        "cuda.decode None",
        "cuda.decode 1",
        "triton.decode None",
        "cuda.decode None",
        "cuda.decode None",
        "triton.decode None",
    ]


def test_every_op_obeys_the_backend_argument(spy):
    for name in OPS:
        getattr(torch.ops.tq4, name)(*op_arguments(name), backend=dispatch.TRITON)
        getattr(torch.ops.tq4, name)(*op_arguments(name), backend=dispatch.CUDA_SM80)
    expected = []
    for name in OPS:
        expected += [f"triton.{name} None", f"cuda.{name} 1"]
    assert spy == expected


def test_the_context_is_left_on_an_error_and_is_not_seen_by_other_threads(spy):
    with pytest.raises(KeyError), tq4.backend("triton"):
        seen = []
        thread = threading.Thread(target=lambda: seen.append(tq4.get_backend()))
        thread.start()
        thread.join()
        assert seen == ["auto"]
        raise KeyError
    assert tq4.get_backend() == "auto"


def test_unknown_names():
    case = make_case(head_dim=64, kv_lens=(5,), q_lens=(1,))
    for call in (lambda: tq4.set_backend("cudnn"), lambda: tq4.backend("cudnn").__enter__()):
        with pytest.raises(ValueError, match="backend: expected one of auto, cuda.*got 'cudnn'"):
            call()
    with pytest.raises(ValueError, match="backend: expected one of"):
        case.attend("cudnn")
    with pytest.raises(ValueError, match="backend: expected 0 .. 4"):
        torch.ops.tq4.decode(*op_arguments("decode"), backend=5)


def test_unknown_name_in_the_environment(monkeypatch, case):
    monkeypatch.setenv("TQ4_BACKEND", "cudnn")
    with pytest.raises(ValueError, match="TQ4_BACKEND: expected one of"):
        case.attend()
    assert case.attend("reference").any()


@pytest.mark.parametrize("name", ("cuda", "cuda-sm80"))
def test_a_request_that_cannot_be_met_says_who_asked_and_why(name, case, monkeypatch):
    with pytest.raises(RuntimeError, match=f"'{name}' was requested by the backend argument.*on cpu: .*CUDA"):
        case.attend(name)
    monkeypatch.setenv("TQ4_BACKEND", name)
    with pytest.raises(RuntimeError, match=f"'{name}' was requested by the environment variable TQ4_BACKEND"):
        case.attend()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_set_backend_refuses_what_this_machine_cannot_do():
    with pytest.raises(RuntimeError, match="'cuda' cannot run on this machine"):
        tq4.set_backend("cuda")
    with pytest.raises(RuntimeError, match="'cuda' cannot run on this machine"), tq4.backend("cuda"):
        pass
    assert tq4.get_backend() == "auto"


def test_environment_variables_are_read_in_every_call(monkeypatch):
    name = "TQ4_TEST_VARIABLE"
    monkeypatch.delenv(name, raising=False)
    assert variable(name) is None
    for text in ("x", "", "\u00e4"):
        monkeypatch.setenv(name, text)
        assert variable(name) == text
    monkeypatch.delenv(name)
    assert variable(name) is None
    # Something else in its place, as some test tools do.
    monkeypatch.setattr(os, "environ", {name: "y"})
    assert variable(name) == "y" and variable("TQ4_BACKEND") is None


def test_triton_on_the_cpu_needs_its_interpreter(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    ok, reason = dispatch.availability("triton", device)
    assert not ok and "TRITON_INTERPRET=1" in reason
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ok, reason = dispatch.availability("triton", device)
    assert ok or "not installed" in reason


def test_available_backends():
    available = tq4.available_backends()
    assert set(available) == {"cuda", "cuda-sm80", "triton", "reference"}
    assert available["reference"][0] and all(reason for _, reason in available.values())


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        (("8.0",), (8, 0), True),
        (("8.0",), (8, 9), True),
        (("8.6",), (8, 0), False),
        (("8.0",), (9, 0), False),
        (("9.0a",), (9, 0), True),
        (("9.0a",), (9, 1), False),
        (("8.0", "9.0a"), (9, 0), True),
        (("10.0",), (10, 3), True),
        (("10.0a",), (10, 3), False),
        (("10.0f",), (10, 3), False),
        (("8.0+PTX",), (12, 0), True),
        (("12.0+PTX",), (10, 0), False),
        (("8.0", "12.0"), (9, 0), False),
        ((), (9, 0), False),
        (("native",), (9, 0), False),
    ],
)
def test_which_gpus_built_architectures_cover(archs, capability, expected):
    assert cuda_backend.covers(archs, capability) is expected


def test_build_info_may_be_missing_or_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_backend, "_PACKAGE", tmp_path)
    for text, archs in (
        (None, ()),
        ("not json", ()),
        ("[1]", ()),
        ('{"archs": "8.0"}', ()),
        ('{"archs": ["8.0", "9.0a"], "nvcc": "13.0"}', ("8.0", "9.0a")),
    ):
        cuda_backend.build_info.cache_clear()
        if text is not None:
            (tmp_path / "_build_info.json").write_text(text)
        assert cuda_backend.built_archs() == archs
    cuda_backend.build_info.cache_clear()


def test_a_missing_or_broken_library_is_a_reason_not_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_backend, "_PACKAGE", tmp_path)
    load = cuda_backend.load.__wrapped__
    cuda_backend.build_info.cache_clear()
    ok, reason = load()
    assert not ok and "no CUDA extension" in reason
    (tmp_path / "_build_info.json").write_text('{"cuda_extension": false, "reason": "there was no nvcc"}')
    cuda_backend.build_info.cache_clear()
    assert "there was no nvcc" in load()[1]
    (tmp_path / "_C.so").write_bytes(b"not a library")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert load() == (False, f"this torch ({torch.__version__}) is built without CUDA")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ok, reason = load()
    assert not ok and "_C.so does not load" in reason
    cuda_backend.build_info.cache_clear()


def test_cuda_backend_copies_rows_that_are_not_aligned():
    wide = torch.zeros(4, 2, 72, dtype=torch.float16)
    aligned, shifted = wide[:, :, :64], wide[:, :, 4:68]
    assert cuda_backend._vectorised(aligned) is aligned
    copy = cuda_backend._vectorised(shifted)
    assert copy.is_contiguous() and copy.data_ptr() % 16 == 0 and torch.equal(copy, shifted)
    odd_rows = torch.zeros(4, 2, 68, dtype=torch.float16)[:, :, :64]
    assert cuda_backend._vectorised(odd_rows).is_contiguous()


def test_schemas_are_kept_in_one_place():
    assert set(ops.SCHEMAS) == set(OPS)


@pytest.mark.parametrize("name", ("prefill", "decode"))
def test_cuda_backend_hands_the_options_on(name, monkeypatch):
    """Each under its own name, from the call of the op to that of the extension."""
    arguments = op_arguments(name)
    seen = []
    fake = types.SimpleNamespace(default=lambda *args: seen.extend(args))
    monkeypatch.setattr(cuda_backend.torch.ops, "tq4_cuda", types.SimpleNamespace(**{name: fake}))
    monkeypatch.setattr(dispatch, "resolve", lambda number, device: (cuda_backend, {"path": 1}))
    options = {
        "causal": False,
        "window_left": 7,
        "window_right": 5,
        "softcap": 2.5,
        "max_query_len": 3,
        "int8": False,
    }
    for given in (options, {}):
        seen.clear()
        getattr(torch.ops.tq4, name)(*arguments, **given)
        schema = getattr(torch.ops.tq4, name).default._schema.arguments[:-1]
        expected = [*arguments, *({a.name: a.default_value for a in schema[16:]} | given).values(), 1]
        for argument, actual, value in zip((*(a.name for a in schema), "path"), seen, expected, strict=True):
            # Rotations may be matrices made of signs, rows may be copied: here neither is.
            assert actual is value if isinstance(value, torch.Tensor) else actual == value, argument


def test_cuda_backend_hands_the_arguments_on(monkeypatch):
    """What reaches the extension: aligned rows in, results copied back, everything else untouched."""
    seen = {}

    def fill(name: str, **arguments) -> None:
        seen.update(arguments)
        for argument in MUTATED[name]:
            if arguments.get(argument) is not None:
                arguments[argument].fill_(3)

    def stand_in(name: str) -> types.SimpleNamespace:
        names = [a.name for a in getattr(torch.ops.tq4_cuda, name).default._schema.arguments]
        return types.SimpleNamespace(
            default=lambda *args, **kwargs: fill(name, **dict(zip(names, args, strict=False)), **kwargs)
        )

    fake = types.SimpleNamespace(**{name: stand_in(name) for name in OPS})
    monkeypatch.setattr(cuda_backend.torch.ops, "tq4_cuda", fake)
    for name, signs in itertools.product(OPS, (False, True)):
        names = [a.name for a in getattr(torch.ops.tq4, name).default._schema.arguments]
        arguments = dict(zip(names, op_arguments(name, signs=signs), strict=False))
        for argument in ("q", "key", "out", "packed", *(ROTATIONS if signs else ())):
            if arguments.get(argument) is not None:
                # The same tensor at an address that is not a multiple of 16.
                x = arguments[argument]
                flat = torch.zeros(x.numel() + 16, dtype=x.dtype)
                arguments[argument] = flat[1 : 1 + x.numel()].view(x.shape).copy_(x)
        if name in ("prefill", "decode"):
            arguments["path"] = 1
        seen.clear()
        getattr(cuda_backend, name)(**arguments)
        for argument, value in arguments.items():
            if argument in MUTATED[name]:
                assert (value == 3).all()
            elif isinstance(value, torch.Tensor):
                expand = argument in ROTATIONS and name in _BY_MATRIX
                assert torch.equal(seen[argument], as_matrix(value) if expand else value)
            elif argument != "path" or name in ("prefill", "decode"):
                assert seen[argument] == value
        for argument in ("q", "key", "out", "packed", *ROTATIONS):
            if seen.get(argument) is not None:
                assert seen[argument].data_ptr() % 16 == 0
