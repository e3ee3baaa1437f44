"""Configuration of the test suite.

Without a CUDA GPU the Triton kernels run in Triton's interpreter; TRITON_INTERPRET must be set before triton
is first imported, hence here.  Tests marked ``gpu`` are skipped there.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent
try:
    import tq4  # the installed package
except ImportError:
    sys.path.insert(0, str(ROOT / "python"))
    import tq4

if not HAS_GPU:
    torch.set_num_threads(1)  # the shapes are tiny: threads only wait for each other


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU; skipped where there is none")
    config.addinivalue_line(
        "markers", "sanitizer: the reduced set that tests/sanitize.py runs for compute-sanitizer"
    )


def pytest_report_header() -> str:
    gpu = torch.cuda.get_device_name() if HAS_GPU else "no CUDA GPU (Triton interpreted)"
    ready = ", ".join(name for name, (ok, _) in tq4.available_backends().items() if ok)
    return f"tq4 from {Path(tq4.__file__).parent}; torch {torch.__version__}; {gpu}; backends: {ready}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="no CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Stop after a CUDA error: it leaves the context unusable, and every later test would fail for it."""
    report = yield
    if call.excinfo is not None and "CUDA error" in str(call.excinfo.value):
        item.session.shouldstop = f"CUDA error by {item.nodeid}, or before it (set CUDA_LAUNCH_BLOCKING=1)"
    return report


@pytest.fixture(autouse=True)
def _same_start(request: pytest.FixtureRequest):
    """Every test begins with the same seeds, the automatic backend and the prefill kernel of its target."""
    callspec = getattr(request.node, "callspec", None)
    target = callspec.params.get("target") if callspec is not None else None
    with getattr(target, "chosen", contextlib.nullcontext)():
        random.seed(0)
        torch.manual_seed(0)
        yield
    tq4.set_backend(None)
