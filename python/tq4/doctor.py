"""``tq4 doctor``: what this machine has, what was built, and what each backend can do here."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from . import dispatch
from .backends import cuda as cuda_backend

_OPS = ("store", "gather", "compress", "decompress", "prefill", "decode")
_ENVIRONMENT = ("TQ4_BACKEND", "TQ4_DEBUG", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")


@dataclass
class Gpu:
    """One visible GPU."""

    index: int
    name: str
    capability: str  # "9.0"
    memory_gib: float
    sms: int


@dataclass
class Backend:
    """One backend on the current device."""

    name: str
    available: bool
    reason: str  # what it will use, or why it cannot run
    ops: list[str]
    check_passed: bool | None = None  # None: not run
    check: str = ""


@dataclass
class Report:
    """Everything `tq4 doctor` prints."""

    tq4: str
    python: str
    system: str
    torch: str
    torch_cuda: str | None
    triton: str | None
    driver: str | None
    nvcc: str | None
    gpus: list[Gpu]
    extension: str  # path of the library, or why there is none
    extension_archs: list[str]
    extension_nvcc: str | None
    default_cpu: str
    default_cuda: str | None
    backends: list[Backend]
    environment: dict[str, str] = field(default_factory=dict)


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    text = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return text.strip().splitlines()[0].strip() if text and text.strip() else None


def _nvcc() -> str | None:
    """Version and path of the nvcc that an installation from source would use."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    places += [os.environ.get("CUDACXX", ""), shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    for place in places:
        if place and os.access(place, os.X_OK):
            version = re.search(r"V(\d+\.\d+\.\d+)", _run(place, "--version") or "")
            if version:
                return f"{version.group(1)} ({place})"
    return None


def _gpus() -> list[Gpu]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            Gpu(
                index=index,
                name=properties.name,
                capability=f"{properties.major}.{properties.minor}",
                memory_gib=round(properties.total_memory / 2**30, 1),
                sms=properties.multi_processor_count,
            )
        )
    return gpus


def _extension() -> str:
    """Path of the loaded library, or why it is not loaded, or why there is none."""
    loaded, text = cuda_backend.load()
    if loaded:
        return text
    libraries = sorted(Path(cuda_backend.__file__).parent.parent.glob("_C*.so"))
    if libraries:
        return f"{libraries[0]}, not loaded: {text}"
    recorded = cuda_backend.build_info().get("reason")
    return f"not built: {recorded}" if recorded else text


def _automatic(device: str) -> str:
    """The backend that tensors of this device get when a call does not choose."""
    try:
        module, _ = dispatch.resolve(dispatch.AUTO, torch.device(device))
    except (RuntimeError, ValueError) as error:
        return f"no backend: {error}"
    return module.__name__.rpartition(".")[2]


def _check(name: str, device: torch.device) -> tuple[bool, str]:
    """Store, prefill and decode a few tokens with one backend, against the reference in plain torch."""
    import tq4

    generator = torch.Generator("cpu").manual_seed(0)
    tokens, q_heads, kv_heads, dim = 40, 4, 2, 64
    quantizer = tq4.Quantizer(dim, device=device)
    cache = tq4.PagedCache(4, kv_heads, dim, block_size=16, device=device)
    q, k, v = (
        torch.randn(tokens, heads, dim, generator=generator).to(device, torch.float16)
        for heads in (q_heads, kv_heads, kv_heads)
    )
    blocks = torch.tensor([cache.allocate(3)], dtype=torch.int32, device=device)
    position = torch.arange(tokens, device=device)
    slots = blocks[0].long()[position // 16] * 16 + position % 16
    lengths = torch.tensor([tokens], dtype=torch.int32, device=device)
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=device)

    def attend(backend: str) -> list[torch.Tensor]:
        tq4.store(k, v, cache, slots, quantizer, backend=backend)
        whole = tq4.prefill(q, cache, blocks, lengths, starts, quantizer, backend=backend)
        last = tq4.decode(q[-1:], cache, blocks, lengths, quantizer, backend=backend)
        return [whole.float(), last.float()]

    try:
        pairs = list(zip(attend(name), attend("reference"), strict=True))
        error = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    except Exception as failure:  # noqa: BLE001 (any failure is the finding)
        return False, f"{type(failure).__name__}: {failure}".splitlines()[0]
    return error < 1e-2, f"differs from the reference by {error:.1e}"


def examine(check: bool = False) -> Report:
    """Collect the report.

    Args:
        check: also run every available backend on a small input and compare it with the reference.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backends = []
    for name, (available, reason) in dispatch.available_backends().items():
        backend = Backend(name, available, reason, list(_OPS) if available else [])
        if check and available:
            backend.check_passed, backend.check = _check(name, device)
        backends.append(backend)
    info = cuda_backend.build_info()
    return Report(
        tq4=_package_version("tq4") or "not installed (run from its source tree)",
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        triton=_package_version("triton"),
        driver=_driver(),
        nvcc=_nvcc(),
        gpus=_gpus(),
        extension=_extension(),
        extension_archs=list(cuda_backend.built_archs()),
        extension_nvcc=info.get("nvcc"),
        default_cpu=_automatic("cpu"),
        default_cuda=_automatic("cuda") if device.type == "cuda" else None,
        backends=backends,
        environment={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    )


def to_json(report: Report) -> str:
    """The report as one JSON object."""
    return json.dumps(asdict(report), indent=2)


def show(report: Report, console: Console | None = None) -> None:
    """Print the report as two tables."""
    console = console or Console()
    machine = Table(title="Machine", show_header=False, title_justify="left")
    machine.add_column(style="bold", no_wrap=True)
    machine.add_column(overflow="fold")
    if report.gpus:
        for gpu in report.gpus:
            machine.add_row(
                f"GPU {gpu.index}",
                f"{gpu.name}, compute capability {gpu.capability}, {gpu.sms} SMs, {gpu.memory_gib} GiB",
            )
    else:
        machine.add_row("GPU", "none that torch can use")
    machine.add_row("driver", report.driver or "none (nvidia-smi not found or no device)")
    machine.add_row("torch", f"{report.torch}, CUDA {report.torch_cuda or 'none'}")
    machine.add_row("triton", report.triton or "not installed")
    machine.add_row("nvcc", report.nvcc or "not found; a build from source needs 12.8 or later")
    machine.add_row("python", f"{report.python}, {report.system}")
    machine.add_row("tq4", report.tq4)
    machine.add_row("extension", report.extension)
    if report.extension_archs:
        machine.add_row("built for", f"{', '.join(report.extension_archs)} (nvcc {report.extension_nvcc})")
    for name, value in report.environment.items():
        machine.add_row(name, value)
    console.print(machine)

    checked = any(backend.check for backend in report.backends)
    table = Table(title="Backends", title_justify="left")
    table.add_column("backend", style="bold", no_wrap=True)
    table.add_column("here", no_wrap=True)
    table.add_column("operations", overflow="fold")
    table.add_column("why", overflow="fold")
    if checked:
        table.add_column("check", overflow="fold")
    for backend in report.backends:
        row = [
            backend.name,
            "[green]yes[/green]" if backend.available else "[red]no[/red]",
            ", ".join(backend.ops) if backend.ops else "none",
            backend.reason,
        ]
        if checked:
            colour = {True: "green", False: "red", None: "dim"}[backend.check_passed]
            row.append(f"[{colour}]{backend.check or 'not run'}[/{colour}]")
        table.add_row(*row)
    console.print(table)
    console.print(f"CPU tensors use [bold]{report.default_cpu}[/bold].", highlight=False)
    if report.default_cuda:
        console.print(f"CUDA tensors use [bold]{report.default_cuda}[/bold].", highlight=False)
