"""tq4 eval on a tiny random byte-level model, and the README's section on transformers."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", "5.17", reason="transformers >= 5.17 is not installed")
for package in ("rich", "typer"):
    pytest.importorskip(package)

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from support_transformers import feed, relative, tiny_model, tokens  # noqa: E402
from tq4 import cli, layout  # noqa: E402
from tq4.integrations import agreement, paired  # noqa: E402
from tq4.integrations import cache as cache_module  # noqa: E402
from tq4.integrations.transformers import TQ4Cache, fold_rotation  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SHARED_MODEL = ROOT.parent / "shared" / "model"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        max_position_embeddings=256,
    )
    folder = tmp_path_factory.mktemp("model") / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _invoke(*arguments: str):
    return CliRunner(env={"COLUMNS": "240", "NO_COLOR": "1"}).invoke(cli.app, ["eval", *arguments])


@pytest.fixture
def few_decoded(monkeypatch):
    from tq4.integrations import evaluate

    monkeypatch.setattr(evaluate, "_DECODE_TOKENS", 4)
    monkeypatch.setattr(evaluate, "_WARM_TOKENS", 1)


def test_eval(model_folder, tmp_path, few_decoded):
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.py"
    text.write_bytes(bytes(range(32, 127)) * 2)
    options = "--device cpu --window 48 --windows 2 --pair-windows 3 --chunk 20"
    options += " --generate 5 --prompts 2 --prompt 16"
    plot, records = tmp_path / "plots" / "loss.png", tmp_path
    done = _invoke(
        "--model", str(model_folder), "--text", str(text), *options.split(), "--backends", "reference",
        "--plot", str(plot), "--json", str(records),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    record = json.loads((records / "cpu-transformers.json").read_text())
    rows = {row["impl"]: row for row in record["rows"]}
    assert record["scored"] == 2 * 47 and record["unit"] == "byte"
    # Of a source tree its hash, of an installed package its version.
    assert len(record["source_hash"]) == 64 or record["source_hash"].endswith(", installed")
    expected = ["dense", "TQ4", "TQ4, norm correction", "TQ4, edge layers dense", "TQ4, first chunk dense"]
    expected += ["TQ4, fp16 scores", "TQ4, reference backend"]
    assert list(rows)[:7] == expected
    for name in expected:
        assert name in done.output
    dense, default, again = rows["dense"], rows["TQ4"], rows["TQ4, reference backend"]
    assert dense["agreement"] == dense["greedy_same"] == 1.0
    assert dense["cache_bytes"] == 48 * 3 * 64 * 2 * 2
    assert default["cache_bytes"] == 48 * 3 * layout.token_bytes(1, 64)
    edge = rows["TQ4, edge layers dense"]["cache_bytes"]
    assert edge == 48 * (layout.token_bytes(1, 64) + 2 * 64 * 2 * 2)
    assert default["nats"] == again["nats"] and again["agreement_with_tq4"] == 1.0
    assert default["nats"] != dense["nats"] and abs(default["nats"] / dense["nats"] - 1) < 0.1
    assert 0.5 < default["agreement"] < 1.0
    assert again["vs_tq4"] == again["vs_tq4_error"] == 0.0 and again["greedy_same"] is None
    assert abs(default["vs_dense"] - (default["nats"] / dense["nats"] - 1)) < 1e-6
    assert default["vs_dense_error"] > 0.0 and f"{100 * default['vs_dense']:+.3f} ±" in done.output
    scores = record["int8_vs_fp16"]
    assert scores["tokens"] == 3 * 47 and scores["error"] > 0 and 0.5 < scores["agreement"] <= 1.0
    assert f"nats {100 * scores['relative']:+.3f} ±" in done.output and record["backends"] is None
    for row in record["rows"]:
        assert row["ms"] > 0 and row["gbps"] > 0 and row["prefill_us"] > 0 and len(row["by_position"]) > 8
        assert row["hq"] == 2 and row["hkv"] == 1 and row["d"] == 64 and row["kv_len"] == 48
    phases = ["load", "warm up", "windows", "decode", "pair windows", "generate"]
    assert list(record["seconds"]) == phases
    for phase in phases:
        assert re.search(rf"^{phase}: \d+\.\d s", done.output, re.MULTILINE), done.output
    assert "TQ4, norm correction " in done.output
    assert re.search(r"^seconds: .*load", done.output, re.MULTILINE)
    assert plot.stat().st_size > 1000


def test_eval_losses_are_the_models(model_folder, tmp_path, few_decoded):
    """The dense row is the model's own loss, computed without a cache."""
    from tq4.integrations import evaluate

    text = tmp_path / "text"
    text.write_bytes(bytes(range(64, 104)))
    settings = evaluate.Settings(
        model=str(model_folder), text=[text], window=40, chunk=16, generate=0, device="cpu", dtype="float16"
    )
    result = evaluate.run(settings)
    ids = torch.arange(64, 104)[None]
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float16)
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    assert abs(result.variants[0].nats / loss - 1) < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda"], "device: torch sees no CUDA GPU"),
        (["--device", "cpu", "--backends", "cuda"], "backends: cuda cannot run"),
        (["--device", "cpu", "--backends", "magic"], "backend: expected one of"),
        (["--device", "cpu", "--page", "8"], "block_size"),
    ],
)
def test_eval_says_what_is_wrong(model_folder, tmp_path, options, message):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    text = tmp_path / "text"
    text.write_text("some text")
    done = _invoke("--model", str(model_folder), "--text", str(text), *options)
    assert done.exit_code == 1 and message in done.output


def test_eval_without_a_model(tmp_path):
    (tmp_path / "text").write_text("text")
    done = _invoke("--model", str(tmp_path), "--text", str(tmp_path / "text"), "--device", "cpu")
    assert done.exit_code == 1 and "tq4 eval:" in done.output


def test_readme_section_runs(model_folder, monkeypatch, capsys):
    """The code of "Use it in transformers", with the tiny model for the one it names."""
    import transformers

    section = (ROOT / "README.md").read_text().split("## Use it in transformers")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10

    class Tokenizer:
        def __call__(self, text: str, return_tensors: str) -> transformers.BatchEncoding:
            assert return_tensors == "pt"
            ids = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()[None]
            return transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

        def decode(self, ids: torch.Tensor, **options: object) -> str:
            return bytes(ids.tolist()).decode("latin-1")

    load = AutoModelForCausalLM.from_pretrained

    def tiny(name: str, **options: object):
        options.pop("device_map", None)
        return load(model_folder, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", tiny)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: Tokenizer())
    names: dict[str, object] = {}
    exec(code, names)
    assert capsys.readouterr().out.startswith("The ")
    caches = [value for value in names.values() if isinstance(value, TQ4Cache)]
    assert caches and caches[0].nbytes > 0


@pytest.mark.skipif(not SHARED_MODEL.is_dir(), reason="no trained model at ../shared/model")
def test_folding_a_trained_model():
    """Logits equal to 1e-2 in bf16."""
    model = AutoModelForCausalLM.from_pretrained(SHARED_MODEL, dtype=torch.bfloat16).eval()
    text = (ROOT / "python" / "tq4" / "layout.py").read_bytes()[:96]
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[None]
    before = feed(model, None, ids, None, [96], "sdpa")
    assert fold_rotation(model) == model.config.num_hidden_layers
    assert relative(feed(model, None, ids, None, [96], "sdpa"), before) < 1e-2
    quality = feed(model, TQ4Cache(model), ids, None, [95, 1], "tq4")
    assert (quality.argmax(-1) == before.argmax(-1)).float().mean() > 0.85


# ---- Paired differences.


def test_change_is_the_ratio_of_means():
    base = [torch.rand(40) + 0.5, torch.rand(40) + 0.5]
    scaled = paired.change([1.25 * part for part in base], base, 8)
    assert abs(scaled.relative - 0.25) < 1e-6 and scaled.error < 1e-6 and str(scaled).startswith("+25.000 ±")
    alone = paired.change(base[:1], base[1:], 40)
    assert alone.error is None and "±" not in str(alone)
    with pytest.raises(ValueError, match="losses"):
        paired.change(base, base[:1])


def test_change_knows_its_error():
    """Of equal runs with noise that tokens of a block share, two in three are within a standard error."""
    block, within = 16, 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        base = [torch.rand(64 * block, generator=generator) + 0.5]
        shared = 0.1 * torch.randn(64, generator=generator).repeat_interleave(block)
        found = paired.change([base[0] + shared], base, block)
        within += abs(found.relative) < found.error
    assert 0.58 < within / 200 < 0.78


# ---- Backends.


@pytest.fixture
def backends_to_compare(monkeypatch):
    """Attention by the names "reference" and "again" (the same), and "other" (fp16 scores); store by one."""

    def renamed(op, exact: bool):
        def call(*arguments, backend: str | None, **options):
            assert backend in (None, "reference", "again", "other")
            if exact and backend == "other":
                options["int8"] = False
            calls.append((op.__name__, backend))
            return op(*arguments, backend="reference", **options)

        return call

    calls: list[tuple[str, str]] = []
    for name in ("decode", "prefill", "store"):
        monkeypatch.setattr(cache_module, name, renamed(getattr(cache_module, name), exact=name != "store"))
    return calls


def test_backends_are_compared_on_their_own_caches_and_on_one(backends_to_compare):
    model = tiny_model("llama", torch.bfloat16)
    prompts, text = tokens(2, 24), tokens(2, 17, seed=2)
    titles: list[str] = []
    names = ["reference", "again", "other"]
    options = {"max_length": 24 + 17}
    with torch.no_grad():
        found = agreement.compare(model, prompts, text, names, options, titles.append)
    assert len(titles) == agreement.steps(names, 17) and found.tokens == 2 * 17
    assert set(found.own_caches) == {"reference, again", "reference, other", "again, other"}
    for shares in (found.own_caches, found.one_cache):
        assert shares["reference, again"] == 1.0 and 0.5 < shares["again, other"] <= 1.0
    # The same attention has no error, the other mode the small one of INT8 scores, in every layer.
    assert found.attention_error["again"] == [0.0] * 4
    assert all(0.0 < error < 0.03 for error in found.attention_error["other"])
    assert set(found.with_text) == set(names)
    with torch.no_grad():
        assert agreement.compare(model, prompts, text, names[:1], options, titles.append) is None
        with pytest.raises(ValueError, match="prompts"):
            agreement.compare(model, prompts[:, :1], text, names, options, titles.append)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_one_cache_holds_what_its_first_backend_stores(backends_to_compare, architecture):
    """Steps of others leave no trace, in pages or sliding layers: the first one chooses as if alone."""
    model = tiny_model(architecture)
    prompts, text = tokens(2, 24), tokens(2, 12, seed=2)
    model.set_attn_implementation("tq4")
    with torch.no_grad():
        shared = agreement._SharedCache(model, backend="reference", max_length=36)
        alone = TQ4Cache(model, backend="reference", max_length=36)
        for cache in (shared, alone):
            agreement._choose(model, cache, prompts)
        shared.activate_past_recording()
        names = ["reference", "other"]
        choices = agreement._take_turns(model, shared, text, names, lambda title: None)
        expected = [agreement._choose(model, alone, token) for token in text.split(1, 1)]
    assert torch.equal(choices["reference"], torch.stack(expected, 1))
    assert shared.get_seq_length() == alone.get_seq_length() == 36
    for mine, other in zip(shared.tq4_layers, alone.tq4_layers, strict=True):
        assert torch.equal(mine.pool.tensor, other.pool.tensor)
    assert ("decode", "other") in backends_to_compare and all(shared.errors("other"))


def test_eval_compares_backends(model_folder, tmp_path, few_decoded, backends_to_compare, monkeypatch):
    """The table and the record of several backends."""
    from tq4 import dispatch

    monkeypatch.setattr(dispatch, "availability", lambda name, device: (True, ""))
    text = tmp_path / "text.py"
    text.write_bytes(bytes(range(32, 127)) * 2)
    options = "--device cpu --window 48 --windows 1 --generate 5 --prompts 2 --prompt 16"
    done = _invoke(
        "--model", str(model_folder), "--text", str(text), *options.split(),
        "--backends", "reference,other", "--json", str(tmp_path),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "cpu-transformers.json").read_text())
    compared = record["backends"]
    assert compared["backends"] == ["reference", "other"] and compared["tokens"] == 10
    assert list(record["seconds"])[-3:] == ["generate", "own caches", "one cache"]
    (pair,) = compared["own_caches"]
    assert pair == "reference, other" and set(compared["one_cache"]) == {pair}
    assert "own caches" in done.output and f"{compared['one_cache'][pair]:.4f}" in done.output
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "scripts" / "update_readme.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    shown = script.render_transformers(record)
    assert f"| {pair} | {compared['own_caches'][pair]:.4f} | {compared['one_cache'][pair]:.4f} |" in shown
    assert f"{100 * record['int8_vs_fp16']['relative']:+.3f} % " not in shown  # the error follows


def test_eval_needs_no_gpu_to_be_described():
    done = CliRunner().invoke(cli.app, ["eval", "--help"])
    assert done.exit_code == 0 and "--backends" in done.output
