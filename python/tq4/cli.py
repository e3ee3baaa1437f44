"""The command line: ``tq4 demo``, ``tq4 doctor`` and ``tq4 eval``."""

from __future__ import annotations

import enum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(
    name="tq4",
    help="Attention over a 4-bit TurboQuant (TQ4) KV cache.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class _Device(str, enum.Enum):
    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"


class _DType(str, enum.Enum):
    float16 = "float16"
    bfloat16 = "bfloat16"


class _Layout(str, enum.Enum):
    token_major = "token_major"
    head_major = "head_major"


class _Rotation(str, enum.Enum):
    hadamard = "hadamard"
    haar = "haar"


def _version(value: bool) -> None:
    if value:
        typer.echo(f"tq4 {metadata.version('tq4')}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version


@app.command()
def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Also run every available backend on a small input (compiles kernels)."),
    ] = False,
) -> None:
    """Say what this machine has and what each backend can do here, and why not.

    Exits with 1 if --check found a backend that fails.
    """
    from . import doctor as module

    report = module.examine(check=check)
    if json_output:
        typer.echo(module.to_json(report))
    else:
        module.show(report)
    if any(backend.check_passed is False for backend in report.backends):
        raise typer.Exit(1)


@app.command()
def demo(
    qkv: Annotated[
        Optional[Path],  # noqa: UP007, UP045 (typer evaluates this on Python 3.10)
        typer.Option(
            help="A safetensors file with q [T, Hq, D], k and v [T, Hkv, D] (after RoPE). Default: generated "
            "data with attention sinks and outlier channels.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    tokens: Annotated[
        Optional[int],  # noqa: UP007, UP045
        typer.Option(min=2, help="Tokens [default: the file's; generated: 4096 on a GPU, 1024 on a CPU]."),
    ] = None,
    q_heads: Annotated[int, typer.Option(min=1, help="Query heads of the generated data.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="KV heads of the generated data.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Their head dimension: 64, 96, 128 or 256.")] = 128,
    decode_tokens: Annotated[
        int, typer.Option(min=1, max=64, help="Tokens decoded one by one, the last.")
    ] = 8,
    page: Annotated[int, typer.Option(help="Tokens per cache page, a multiple of 16.")] = 16,
    layout: Annotated[_Layout, typer.Option(help="Page layout of the cache.")] = _Layout.token_major,
    rotation: Annotated[_Rotation, typer.Option(help="Rotation of the quantiser.")] = _Rotation.hadamard,
    norm_correction: Annotated[bool, typer.Option(help="Decoded vectors keep their exact length.")] = False,
    dtype: Annotated[_DType, typer.Option(help="Type of q, k, v and of the output.")] = _DType.float16,
    device: Annotated[_Device, typer.Option(help="auto: the GPU if there is one.")] = _Device.auto,
    seed: Annotated[int, typer.Option(help="Seed of the generated data and of the page order.")] = 0,
    json_file: Annotated[
        Optional[Path],  # noqa: UP007, UP045
        typer.Option("--json", help="Also write the results to this file.", dir_okay=False),
    ] = None,
) -> None:
    """Store, prefill and decode real or generated queries, keys and values, and print one table.

    The table has the bytes of the cache against fp16, the error against attention that was never quantised
    and against exact attention over the same cache, and the time of every backend against torch's attention.
    """
    from . import demo as module

    try:
        settings = module.Settings(
            qkv=qkv,
            tokens=tokens,
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            decode_tokens=decode_tokens,
            page=page,
            layout=layout.value,
            rotation=rotation.value,
            norm_correction=norm_correction,
            dtype=dtype.value,
            device=device.value,
            seed=seed,
        )
        result = module.run(settings)
    except (ValueError, RuntimeError) as error:
        typer.echo(f"tq4 demo: {error}", err=True)
        raise typer.Exit(1) from None
    module.show(result)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(module.to_json(result))


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Option(help="A transformers model: a folder or a hub name.")],
    text: Annotated[
        list[Path], typer.Option(help="A text file; may be repeated.", exists=True, dir_okay=False)
    ],
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window of text.")] = 8192,
    windows: Annotated[int, typer.Option(min=1, help="At most so many windows.")] = 8,
    pair_windows: Annotated[
        int,
        typer.Option(
            min=0,
            help="Windows on which INT8 and fp16 scores are compared; only these two read those past "
            "--windows.",
        ),
    ] = 24,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens of one forward call.")] = 1024,
    edge: Annotated[int, typer.Option(min=1, help="Layers at each end in 'edge layers dense'.")] = 1,
    backends: Annotated[str, typer.Option(help="Compare these, such as cuda,triton,reference.")] = "",
    generate: Annotated[int, typer.Option(min=0, help="Tokens to generate from each prompt; 0: none.")] = 256,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts to generate from.")] = 16,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    page: Annotated[int, typer.Option(help="Tokens per cache page, a multiple of 16.")] = 16,
    dtype: Annotated[_DType, typer.Option(help="Type of the model.")] = _DType.bfloat16,
    device: Annotated[_Device, typer.Option(help="auto: the GPU if there is one.")] = _Device.auto,
    plot_file: Annotated[
        Optional[Path],  # noqa: UP007, UP045
        typer.Option("--plot", help="Draw the loss by position into this file.", dir_okay=False),
    ] = None,
    json_file: Annotated[
        Optional[Path],  # noqa: UP007, UP045
        typer.Option("--json", help="Also write the record to this file (or folder, under the GPU's name)."),
    ] = None,
) -> None:
    """Perplexity and agreement of a language model on a TQ4 cache, against dense and other 4-bit caches.

    The seconds of each phase go to stderr as it ends: fewer windows, tokens to generate or backends take
    less.

    Needs transformers: pip install tq4[transformers].
    """
    try:
        import torch

        from .integrations import evaluate as module
        from .integrations import report

        chosen = device.value
        if device is _Device.auto:
            chosen = "cuda" if torch.cuda.is_available() else "cpu"
        settings = module.Settings(
            model=model,
            text=text,
            window=window,
            windows=windows,
            pair_windows=pair_windows,
            chunk=chunk,
            edge=edge,
            backends=[name.strip() for name in backends.split(",") if name.strip()],
            generate=generate,
            prompts=prompts,
            prompt=prompt,
            page=page,
            dtype=dtype.value,
            device=chosen,
        )
        if plot_file is not None:
            import matplotlib  # noqa: F401  (missing: say so before the work, not after it)
        result = module.run(settings)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        typer.echo(f"tq4 eval: {error}", err=True)
        raise typer.Exit(1) from None
    report.show(result)
    if plot_file is not None:
        report.plot(result, plot_file)
    if json_file is not None:
        typer.echo(f"record: {report.write(result, json_file)}")


def main() -> None:
    """Entry point of the ``tq4`` command."""
    app()


if __name__ == "__main__":
    main()
