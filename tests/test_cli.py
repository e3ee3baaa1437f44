"""The command line: tq4 demo, tq4 doctor and the data and yardsticks behind the demo."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch

import tq4
from tq4 import layout

for package in ("rich", "safetensors", "typer"):
    pytest.importorskip(package)  # a bare environment can still run the rest of the suite

from safetensors.torch import save_file  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from tq4 import cli, demo, doctor  # noqa: E402

CPU_DEMO = ["demo", "--device", "cpu", "--q-heads", "4", "--kv-heads", "2", "--head-dim", "64"]


def _invoke(*arguments: str):
    # A wide terminal, so that no cell of a table is folded.
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(cli.app, list(arguments))


# ---- demo -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--layout", "head_major", "--page", "32", "--rotation", "haar"],
        ["--dtype", "bfloat16", "--norm-correction", "--decode-tokens", "1"],
    ],
)
def test_demo_prints_one_table_and_keeps_its_promises(tmp_path, options):
    path = tmp_path / "results" / "demo.json"
    done = _invoke(*CPU_DEMO, "--tokens", "50", "--json", str(path), *options)
    assert done.exit_code == 0, done.output
    for word in ("cache, K", "cache, V", "store", "prefill", "decode", "torch SDPA, dense", "reference"):
        assert word in done.output
    result = json.loads(path.read_text())
    tokens = result["shape"]["prefill"] + result["shape"]["decode"]
    assert tokens == 50
    assert result["cache_bytes"] == tokens * layout.token_bytes(2, 64)
    assert result["fp16_bytes"] == tokens * 2 * 64 * 2 * 2
    assert 0.05 < result["key_error"] < 0.15 and 0.05 < result["value_error"] < 0.15
    rows = {(row["step"], row["implementation"]): row for row in result["rows"]}
    for step in ("prefill", "decode"):
        dense, tq4_row = rows[step, "torch SDPA, dense"], rows[step, "reference"]
        assert dense["vs_unquantised"] < 0.02  # the rounding of a 16-bit output
        assert 0.02 < tq4_row["vs_unquantised"] < 0.4
        assert tq4_row["vs_same_cache"] < 0.02
        assert tq4_row["vs_same_cache"] < tq4_row["vs_unquantised"] / 4
        assert tq4_row["ms"] > 0 and tq4_row["speedup"] is None
    assert rows["store", "reference"]["ms"] > 0


def test_demo_reads_a_file(tmp_path):
    q, k, v = (t.half() for t in demo.generate(40, 4, 1, 64, seed=1))
    path = tmp_path / "qkv.safetensors"
    save_file({"q": q, "k": k, "v": v}, path)
    done = _invoke("demo", "--device", "cpu", "--qkv", str(path), "--tokens", "33", "--decode-tokens", "2")
    assert done.exit_code == 0, done.output
    assert "qkv.safetensors" in done.output and "4 query / 1 KV heads" in done.output
    assert "31 tokens prefilled, 2 decoded" in done.output


@pytest.mark.parametrize(
    "options, message",
    [
        (["--q-heads", "5"], "--q-heads 5"),
        (["--head-dim", "80"], "head_dim 80"),
        (["--page", "24"], "--page 24"),
        (["--tokens", "8", "--decode-tokens", "8"], "--decode-tokens 8"),
    ],
)
def test_demo_refuses_with_one_line(options, message):
    done = _invoke(*CPU_DEMO, "--tokens", "20", *options)
    assert done.exit_code == 1
    assert message in done.output and "Traceback" not in done.output


def test_demo_refuses_bad_files(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"not a safetensors file")
    done = _invoke("demo", "--device", "cpu", "--qkv", str(path))
    assert done.exit_code == 1 and "not a safetensors file" in done.output
    save_file({"q": torch.zeros(4, 2, 64), "k": torch.zeros(4, 1, 64)}, path)
    done = _invoke("demo", "--device", "cpu", "--qkv", str(path))
    assert done.exit_code == 1 and "expected tensors q, k and v" in done.output
    save_file({"q": torch.zeros(4, 2, 64), "k": torch.zeros(5, 1, 64), "v": torch.zeros(5, 1, 64)}, path)
    done = _invoke("demo", "--device", "cpu", "--qkv", str(path))
    assert done.exit_code == 1 and "[4, 2, 64]" in done.output
    assert _invoke("demo", "--qkv", str(tmp_path / "missing")).exit_code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_demo_on_a_missing_gpu_says_so():
    done = _invoke("demo", "--device", "cuda")
    assert done.exit_code == 1 and "no CUDA device" in done.output


@pytest.mark.gpu
def test_demo_on_the_gpu_races_every_backend(tmp_path):
    path = tmp_path / "demo.json"
    done = _invoke("demo", "--tokens", "300", "--json", str(path))
    assert done.exit_code == 0, done.output
    result = json.loads(path.read_text())
    available = [n for n in ("cuda", "triton", "reference") if tq4.available_backends()[n][0]]
    for step in ("prefill", "decode"):
        rows = {row["implementation"]: row for row in result["rows"] if row["step"] == step}
        assert [name for name in rows if name != "torch SDPA, dense"] == available
        for name in available:
            assert rows[name]["vs_same_cache"] < 0.02 and rows[name]["speedup"] > 0


# ---- the demo's data and yardsticks -----------------------------------------------------------


def test_generated_data_has_sinks_and_outlier_channels():
    q, k, v = demo.generate(256, 8, 2, 128, seed=0)
    assert q.shape == (256, 8, 128) and k.shape == v.shape == (256, 2, 128)
    channels = k[8:].square().mean(0).sqrt()
    assert (channels.amax(-1) > 5 * channels.median(-1).values).all()
    assert v[:4].norm(dim=-1).mean() < 0.2 * v[4:].norm(dim=-1).mean()
    keys = k.repeat_interleave(4, dim=1)
    scores = torch.einsum("thd,shd->hts", q[32:], keys) / math.sqrt(128)
    hidden = torch.arange(256)[None, :] > torch.arange(32, 256)[:, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    # Four sinks of 32 to 256 keys would get 4 % on average if they were keys like any other.
    assert weights[..., :4].sum(-1).mean() > 0.15
    assert torch.equal(demo.generate(256, 8, 2, 128, seed=0)[0], q)
    assert not torch.equal(demo.generate(256, 8, 2, 128, seed=1)[0], q)


@pytest.mark.parametrize("queries", [1, 5, 300])
def test_exact_attention_is_bottom_right_causal(queries):
    keys = 300
    q, k, v = (t.double() for t in demo.generate(keys, 4, 2, 64, seed=3))
    q = q[keys - queries :]
    steps = []
    got = demo.exact_attention(q, k, v, lambda: steps.append(1))
    assert len(steps) == -(-queries // 256)
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(2, dim=1)) / 8.0
    position = torch.arange(keys - queries, keys)
    scores = scores.masked_fill(torch.arange(keys)[None, :] > position[:, None], -torch.inf)
    expected = torch.einsum("hts,shd->thd", scores.softmax(-1), v.repeat_interleave(2, dim=1))
    assert (got - expected).norm() / expected.norm() < 1e-5


# ---- doctor -----------------------------------------------------------------------------------


def test_doctor_prints_machine_and_backends():
    done = _invoke("doctor")
    assert done.exit_code == 0, done.output
    for word in ("GPU", "driver", "torch", "triton", "nvcc", "extension", "cuda-sm80", "reference"):
        assert word in done.output
    assert "CPU tensors use reference" in done.output


def test_doctor_json_gives_a_reason_for_every_backend():
    done = _invoke("doctor", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["torch"] == torch.__version__
    backends = {backend["name"]: backend for backend in report["backends"]}
    assert list(backends) == ["cuda", "cuda-sm80", "triton", "reference"]
    for name, backend in backends.items():
        available, reason = tq4.available_backends()[name]
        assert backend["available"] == available and backend["reason"] == reason != ""
        assert bool(backend["ops"]) == available and backend["check_passed"] is None
    if not torch.cuda.is_available():
        assert report["gpus"] == [] and report["default_cuda"] is None


@pytest.mark.parametrize("name, message", [("cuda", "cannot run on cpu"), ("fast", "expected one of")])
def test_doctor_survives_a_backend_that_cannot_be_had(monkeypatch, name, message):
    monkeypatch.setenv("TQ4_BACKEND", name)
    done = _invoke("doctor", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert message in report["default_cpu"] and report["environment"]["TQ4_BACKEND"] == name


def test_doctor_check_runs_the_reference():
    device = torch.device("cpu")
    assert doctor._check("reference", device) == (True, "differs from the reference by 0.0e+00")


def test_doctor_check_reports_a_backend_that_fails(monkeypatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setattr(tq4, "prefill", broken)
    assert doctor._check("reference", torch.device("cpu")) == (False, "RuntimeError: no such kernel")


@pytest.mark.gpu
def test_doctor_check_passes_on_the_gpu():
    done = _invoke("doctor", "--check", "--json")
    assert done.exit_code == 0, done.output
    for backend in json.loads(done.stdout)["backends"]:
        assert backend["check_passed"] is (True if backend["available"] else None), backend


# ---- the command itself -----------------------------------------------------------------------


def test_help_names_both_commands():
    done = _invoke("--help")
    assert done.exit_code == 0 and "demo" in done.output and "doctor" in done.output


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "tq4.cli", "doctor", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["backends"]
