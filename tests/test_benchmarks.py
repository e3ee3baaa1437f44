"""The benchmark scripts on the CPU: they check before they time, record what they promise, and draw it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

import tq4

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TINY = [
    "--device",
    "cpu",
    "--head-dim",
    "64",
    "--heads",
    "4,2",
    "--rep",
    "1",
    "--warmup",
    "1",
    "--no-flashinfer",
]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch):
    """The scripts import each other as neighbours."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("bench", "peers", "record", "table", "timing", "workloads")
    yield lambda name: __import__(name)
    for name in names:
        sys.modules.pop(name, None)


def fake_record(record, op: str, directory: Path, rows: list[dict]) -> Path:
    env = dict(gpu="NVIDIA H200", driver="1", torch="2", triton="3", date="2026-01-01", source_hash="x")
    return record.write(op, rows, env, directory)


def row(op: str, **changes) -> dict:
    keys = dict(
        op=op, impl="tq4-cuda", hq=32, hkv=8, d=128, dtype="float16", batch=1, q_len=1, kv_len=1024, page=16
    )
    return {**keys, "ms": 0.5, "gbps" if op in ("decode", "store") else "tflops": 10.0, **changes}


@pytest.mark.parametrize("op", ["prefill", "chunk", "step", "store"])
def test_bench_records(
    scripts, op: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = scripts("record")
    monkeypatch.setattr(record, "source_hash", lambda: "0" * 64)
    assert scripts("bench").main([op, *TINY, "--lengths", "16,40", "--results", str(tmp_path)]) == 0
    data = record.load(tmp_path / f"cpu-{op}.json")
    assert data["source_hash"] == "0" * 64 and data["gpu"] == "cpu"
    mine = [r for r in data["rows"] if r["impl"] == "tq4-reference"]
    assert [r["kv_len"] for r in mine] == [16, 40]
    printed = capsys.readouterr().out
    assert "tq4-reference" in printed.split(f"recorded in {tmp_path}")[1], "the table comes last"
    if op == "prefill":
        assert "turboquant-vllm: " in printed and "cannot be imported" in printed
        n = mine[1]
        assert n["tflops"] == pytest.approx(4 * 4 * 64 * 40**2 / 2 / n["ms"] / 1e9, abs=0.006)


def test_mixed_batch(scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """63 decoding sequences and a chunk; the switch of the prefill-only row is set in its calls alone."""
    record, bench = scripts("record"), scripts("bench")
    monkeypatch.setattr(record, "source_hash", lambda: "0" * 64)
    assert bench.main(["mixed", *TINY, "--lengths", "64", "--results", str(tmp_path)]) == 0
    (mine,) = (r for r in record.load(tmp_path / "cpu-mixed.json")["rows"] if r["impl"] == "tq4-reference")
    assert (mine["batch"], mine["q_len"], mine["kv_len"], mine["kv_tokens"]) == (64, 16, 64, 63 * 16 + 64)
    (work,) = scripts("workloads").mixed_workloads(4, 2, 64, "float16", 16, 64)
    seen = []
    monkeypatch.setattr(tq4, "prefill", lambda *a, **k: seen.append(os.environ.get("TQ4_PREFILL_SHORT")))
    inputs = bench.Tq4Inputs(work, "cpu", "token_major")
    q = bench.make_queries(work, "cpu")
    for make in (bench.ours(inputs, "reference"), bench.unrouted(inputs, "reference")):
        make(work, q).call()
    assert seen == [None, "prefill"]


def test_wrong_results_are_not_recorded(scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = tq4.prefill

    def wrong(*args, **kwargs):
        return right(*args, **kwargs).mul_(1.05)

    monkeypatch.setattr(tq4, "prefill", wrong)
    assert scripts("bench").main(["prefill", *TINY, "--lengths", "16", "--results", str(tmp_path)]) == 1
    assert not list(tmp_path.iterdir())


def test_a_wrong_store_is_not_recorded(scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = tq4.store

    def wrong(key, value, cache, slots, quantizer, **options):
        return right(key, value, cache, slots.roll(1), quantizer, **options)

    bench = scripts("bench")
    inputs = scripts("workloads").StoreInputs(20, 2, 64, "float16", 16, "token_major", "cpu")
    inputs.check("reference", "tq4-reference")
    calls = iter((wrong, right))
    monkeypatch.setattr(tq4, "store", lambda *a, **k: next(calls)(*a, **k))
    with pytest.raises(bench.WrongResultError, match="differs from the reference"):
        inputs.check("reference", "tq4-reference")


def test_operation_counts(scripts) -> None:
    work = scripts("workloads").Workload
    assert work("prefill", 32, 8, 128, "float16", 16, (1024,), (1024,)).flops == 4 * 32 * 128 * 1024**2 / 2
    chunk = work("chunk", 32, 8, 128, "float16", 16, (2048,), (8192,))
    assert chunk.flops == 4 * 32 * 128 * (2048 * 6144 + 2048**2 / 2)
    assert work("decode", 32, 8, 128, "float16", 16, (1, 1), (10, 20)).kv_bytes(136) == 30 * 8 * 136


def test_source_hash_sees_sources_only(scripts, tmp_path: Path) -> None:
    record = scripts("record")
    for name in ("csrc/kernels/a.cu", "python/tq4/b.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    first = record.source_hash(tmp_path)
    for name in (
        "python/tq4/_C.so",
        "python/tq4/__pycache__/b.pyc",
        "python/tq4/_build_info.json",
        "README.md",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("product")
    assert record.source_hash(tmp_path) == first
    (tmp_path / "csrc/kernels/a.cu").write_text("changed")
    second = record.source_hash(tmp_path)
    (tmp_path / "csrc/kernels/a.cu").rename(tmp_path / "csrc/kernels/c.cu")
    assert len({first, second, record.source_hash(tmp_path)}) == 3


def test_incomplete_rows_are_refused(scripts, tmp_path: Path) -> None:
    record = scripts("record")
    for bad in ({"ms": 0.0}, {"ms": float("nan")}):
        with pytest.raises(ValueError, match="positive"):
            fake_record(record, "decode", tmp_path, [row("decode", **bad)])
    lacking = row("decode")
    del lacking["page"]
    with pytest.raises(ValueError, match="missing page"):
        fake_record(record, "decode", tmp_path, [lacking])
    with pytest.raises(ValueError, match="no rows"):
        fake_record(record, "decode", tmp_path, [])
    assert not list(tmp_path.iterdir())


def test_table_in_the_readme(scripts, tmp_path: Path) -> None:
    record, table = scripts("record"), scripts("table")
    results = tmp_path / "results"
    lengths = (1024, 16384)
    rows = [
        row("prefill", q_len=n, kv_len=n, tflops=n / 64, impl=i)
        for n in lengths
        for i in ("tq4-cuda", "sdpa-fa2")
    ]
    fake_record(record, "prefill", results, rows)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmark:prefill -->\nold\n<!-- /benchmark:prefill -->\nafter\n")
    args = ["--readme", str(readme), "--results", str(results)]
    assert table.main([*args, "--check"]) == 1
    assert table.main([*args, "--write"]) == 0 and table.main([*args, "--check"]) == 0
    text = readme.read_text()
    assert "| | 1K | 16K |" in text and "| **tq4, CUDA** | 16 | 256 |" in text and "NVIDIA H200" in text
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "2026-01-01, with earlier sources (x) than these." in text
    path = next(results.glob("*.json"))
    path.write_text(path.read_text().replace('"x"', f'"{record.source_hash()}"'))
    assert table.main([*args, "--check"]) == 1 and table.main([*args, "--write"]) == 0
    assert "2026-01-01." in readme.read_text() and "earlier sources" not in readme.read_text()
    readme.write_text("<!-- benchmark:decode -->\n<!-- /benchmark:decode -->\n")
    with pytest.raises(ValueError, match="no record"):
        table.main([*args, "--check"])


def test_plots(scripts, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    record, plot = scripts("record"), scripts("plot")
    lengths = (1024, 8192)
    fake_record(record, "decode", tmp_path, [row("decode", kv_len=n, ms=n / 1e5) for n in lengths])
    fake_record(record, "prefill", tmp_path, [row("prefill", q_len=n, kv_len=n) for n in lengths])
    drawn = []
    for _ in range(2):
        assert plot.main(["--results", str(tmp_path), "--out", str(tmp_path / "docs")]) == 0
        drawn.append({p.name: p.read_text() for p in (tmp_path / "docs").iterdir()})
    assert sorted(drawn[0]) == ["decode.svg", "prefill.svg"] and drawn[0] == drawn[1]


def test_records_in_the_tree_are_complete(scripts) -> None:
    """Whatever has been recorded has every key and says what it was made from."""
    record = scripts("record")
    for path in sorted(record.RESULTS.glob("*.json")):
        data = record.load(path)
        assert len(data["source_hash"]) == 64, path
        assert json.loads(path.read_text())["rows"] == data["rows"]
    assert torch.cuda.is_available() or record.environment("cpu")["gpu"] == "cpu"
