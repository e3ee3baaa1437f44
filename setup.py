"""Builds the tq4 package; the metadata is in pyproject.toml.

The CUDA extension tq4/_C.so is built when nvcc is there.  It uses the LibTorch stable ABI and links the
CUDA runtime statically, so one build serves every torch >= 2.11 and every Python, whatever torch and
Python it was built with: no GPU and no CUDA build of torch are needed to build it.

Environment:
    TQ4_BUILD_CUDA        1: a missing nvcc is an error; 0: skip the extension; unset: build it if possible
    TORCH_CUDA_ARCH_LIST  architectures, "8.0 9.0a"; default: the visible GPU's, else sources.json's list
    CUDA_HOME, CUDACXX    the toolkit, where nvcc is not on PATH
    MAX_JOBS              parallel compilations
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from unittest import mock

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "scripts"))
import cuda_build  # noqa: E402

INFO_NAME = "_build_info.json"


def write_info(package_dir: str | os.PathLike, info: dict) -> None:
    path = Path(package_dir) / INFO_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(info, indent=1, sort_keys=True) + "\n")


def extension_or_reason():
    """(Extension and command classes, "") or (None, why there is no extension)."""
    wish = os.environ.get("TQ4_BUILD_CUDA", "")
    if wish == "0":
        return None, "TQ4_BUILD_CUDA=0 was set when tq4 was installed"
    toolkit, reason = cuda_build.find_toolkit()
    if toolkit is None:
        if wish == "1":
            raise SystemExit(f"tq4: TQ4_BUILD_CUDA=1, but {reason}")
        print(f"tq4: installing without the CUDA extension: {reason}", file=sys.stderr)
        return None, f"when tq4 was installed, {reason}"
    try:
        return cuda_extension(toolkit), ""
    except cuda_build.BuildError as error:
        raise SystemExit(f"tq4: {error}") from None


def cuda_extension(toolkit: cuda_build.Toolkit):
    import torch
    from torch.utils import cpp_extension

    sources = cuda_build.load_sources()
    plan = cuda_build.current_plan(toolkit)
    print(f"tq4: nvcc {toolkit.version_string}, {plan}", file=sys.stderr)
    cxx_flags = list(sources["cxx_flags"]) + (["-DTQ4_HAS_SM90A"] if plan.sm90a else [])
    include_dirs = [str(ROOT / "csrc"), *map(str, toolkit.include_dirs)]

    class BuildCudaExtension(cpp_extension.BuildExtension):
        """BuildExtension, with the kernels compiled group by group: each has its own architectures."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, no_python_abi_suffix=True, **kwargs)

        def build_extension(self, ext):
            # cpp_extension forgets the toolkit, and leaves out header dependencies, where torch itself
            # has no CUDA.  Nothing here depends on torch's CUDA, so it is told about this toolkit.
            with (
                mock.patch.object(cpp_extension, "CUDA_HOME", str(toolkit.home)),
                mock.patch.object(torch.version, "cuda", "{}.{}".format(*toolkit.version)),
            ):
                for index, (files, flags) in enumerate(cuda_build.kernel_groups(plan)):
                    ext.extra_objects += self.compiler.compile(
                        files,
                        output_dir=os.path.join(self.build_temp, f"kernels{index}"),
                        include_dirs=include_dirs,
                        extra_postargs={"cxx": [], "nvcc": flags},
                    )
            super().build_extension(ext)
            target = Path(self.get_ext_fullpath(ext.name)).parent
            write_info(target, cuda_build.build_info(plan, toolkit, torch.__version__))

        def copy_extensions_to_source(self):
            super().copy_extensions_to_source()
            build_py = self.get_finalized_command("build_py")
            info = Path(self.build_lib) / "tq4" / INFO_NAME
            self.copy_file(str(info), os.path.join(build_py.get_package_dir("tq4"), INFO_NAME))

    extension = cpp_extension.CppExtension(
        "tq4._C",
        sources["bindings"] + cuda_build.host_sources(),
        include_dirs=include_dirs,
        py_limited_api=True,  # no Python symbol is used at all
        extra_compile_args={"cxx": cxx_flags},
        extra_link_args=[
            # libtorch.so has no symbol of its own: needed for what it pulls in, libtorch_cuda.so where
            # there is one.  The reference to the current stream is weak, so a CPU torch loads this too.
            "-Wl,--no-as-needed",
            "-ltorch",
            "-Wl,--as-needed",
            str(toolkit.cudart_static),
            "-Wl,--exclude-libs,ALL",
            "-Wl,-Bsymbolic",
            "-ldl",
            "-lpthread",
            "-lrt",
        ],
    )
    return extension, BuildCudaExtension


class BuildPyWithInfo(build_py):
    """Records why there is no extension; with one, build_ext records what was built."""

    def run(self):
        super().run()
        if BUILT is None:
            target = self.get_package_dir("tq4") if self.editable_mode else Path(self.build_lib) / "tq4"
            write_info(target, cuda_build.build_info(None, None, "", REASON))


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: the extension is tied to the platform, not to a Python version."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if BUILT else (python, abi, platform)


BUILT, REASON = extension_or_reason()
cmdclass = {"build_py": BuildPyWithInfo, "bdist_wheel": PlatformWheel}
if BUILT:
    cmdclass["build_ext"] = BUILT[1]
setup(ext_modules=[BUILT[0]] if BUILT else [], cmdclass=cmdclass)
