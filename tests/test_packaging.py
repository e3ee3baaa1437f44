"""The package and the repository: sources.json, source distribution, architecture lists, what the extension
needs at run time, the README's tables, and nothing that belongs to one machine only."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import tq4

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(tq4.__file__).parent

if not (ROOT / "sources.json").exists():
    pytest.skip("needs the source tree", allow_module_level=True)

sys.path.insert(0, str(ROOT / "scripts"))
import cuda_build  # noqa: E402

CODES = tuple("sm_75 sm_80 sm_86 sm_87 sm_89 sm_90 sm_100 sm_103 sm_120 sm_121".split())
# Directories that hold no source: build products and environments.
SKIPPED = {".git", ".venv", "build", "dist", "__pycache__", ".ruff_cache", ".pytest_cache", ".hypothesis"}


def _files(*suffixes: str) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [f for f in folders if f not in SKIPPED and not f.endswith(".egg-info")]
        found += [Path(folder) / name for name in names if name.endswith(suffixes)]
    return found


# ---- sources.json -----------------------------------------------------------------------------


def test_sources_json_lists_every_source_once():
    sources = cuda_build.load_sources()
    listed = sources["bindings"] + [entry["file"] for entry in sources["kernels"]]
    assert len(listed) == len(set(listed))
    present = [
        p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cu", ".cpp")
    ]
    assert sorted(listed) == sorted(present)
    assert {entry["group"] for entry in sources["kernels"]} <= {"portable", "sm90a", "host"}


def test_no_file_is_allowed_local_memory():
    assert not [entry for entry in cuda_build.load_sources()["kernels"] if entry.get("allow_local_memory")]


# ---- architectures ----------------------------------------------------------------------------

ARCH_LISTS = [
    ("8.0 9.0a", ("8.0", "9.0"), None, True),
    ("9.0", ("9.0",), None, True),
    ("8.6;8.9+PTX", ("8.6", "8.9"), "8.9", False),
    ("12.0,8.0", ("8.0", "12.0"), None, False),
    ("Hopper", ("9.0",), "9.0", True),
    ("Ampere Ada", ("8.0", "8.6", "8.9"), "8.9", False),
    ("8.0 8.6 8.9 9.0a 10.0 12.0+PTX", ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0"), "12.0", True),
]


@pytest.mark.parametrize("text, portable, ptx, sm90a", ARCH_LISTS)
def test_plan_archs(text, portable, ptx, sm90a):
    plan = cuda_build.plan_archs(text, CODES)
    assert (plan.portable, plan.ptx, plan.sm90a) == (portable, ptx, sm90a)
    flags = plan.gencode("portable")
    assert len(flags) == len(portable) + (ptx is not None)
    assert not any("90a" in flag for flag in flags)
    assert plan.gencode("sm90a") == (["-gencode=arch=compute_90a,code=sm_90a"] if sm90a else [])


@pytest.mark.parametrize("text", ["7.5", "8.0 banana", "9.9", "sm_90", "", "80"])
def test_plan_archs_refuses(text):
    with pytest.raises(cuda_build.BuildError, match="TORCH_CUDA_ARCH_LIST"):
        cuda_build.plan_archs(text, CODES)


DEFAULTS = [
    ([], CODES, "8.0 8.6 8.9 9.0a 10.0 12.0+PTX"),
    ([], ("sm_80", "sm_90"), "8.0 9.0a"),
    (["9.0"], CODES, "9.0"),
    (["8.6", "12.0"], CODES, "8.6 12.0"),
    (["13.0"], CODES, "12.1+PTX"),
    (["7.5"], ("sm_75", "sm_80", "sm_86"), "8.0 8.6+PTX"),
]


@pytest.mark.parametrize("visible, codes, expected", DEFAULTS)
def test_default_archs(visible, codes, expected):
    assert cuda_build.default_archs(codes, visible) == expected


def _cmake(script: str, tmp_path: Path) -> str:
    cmake = shutil.which("cmake", path=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    if cmake is None:
        pytest.skip("no cmake")
    file = tmp_path / "script.cmake"
    file.write_text(f'cmake_policy(VERSION 3.24)\ninclude("{ROOT}/cmake/Tq4Archs.cmake")\n{script}')
    done = subprocess.run([cmake, "-P", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr.strip()  # where message() without a mode goes


def test_cmake_plans_the_same_architectures(tmp_path):
    codes = ";".join(CODES)
    script = "".join(
        f'tq4_plan_archs("{text}" "{codes}" portable sm90a)\nmessage("${{portable}}|${{sm90a}}")\n'
        for text, *_ in ARCH_LISTS
    )
    expected = []
    for _, portable, ptx, sm90a in ARCH_LISTS:
        names = [arch.replace(".", "") + "-real" for arch in portable]
        names += [ptx.replace(".", "") + "-virtual"] if ptx else []
        expected.append(";".join(names) + "|" + ("90a-real" if sm90a else ""))
    assert _cmake(script, tmp_path).splitlines() == expected


def test_cmake_has_the_same_defaults(tmp_path):
    listed = ";".join(cuda_build.load_sources()["default_archs"])
    script = "".join(
        f'tq4_default_archs(out "{";".join(codes)}" "{";".join(visible)}" "{listed}")\nmessage("${{out}}")\n'
        for visible, codes, _ in DEFAULTS
    )
    assert [line.replace(";", " ") for line in _cmake(script, tmp_path).splitlines()] == [
        expected for *_, expected in DEFAULTS
    ]


# ---- the toolkit ------------------------------------------------------------------------------


def test_toolkit_is_found_through_a_wrapper(tmp_path, monkeypatch):
    toolkit, _ = cuda_build.find_toolkit()
    if toolkit is None:
        pytest.skip("no nvcc")
    wrapper = tmp_path / "nvcc"
    wrapper.write_text(f'#!/bin/sh\nexec "{toolkit.nvcc}" "$@"\n')
    wrapper.chmod(0o755)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("CUDACXX", str(wrapper))
    found, reason = cuda_build.find_toolkit()
    assert found == toolkit, reason


def test_missing_or_old_toolkit_is_a_reason_not_a_crash(tmp_path, monkeypatch):
    fake = tmp_path / "bin" / "nvcc"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/sh\ncase "$1" in\n-dryrun) echo "#$ TOP=/nowhere";;\n'
        "--version) echo 'Cuda compilation tools, release 12.4, V12.4.131';;\n*) echo sm_80;;\nesac\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    toolkit, reason = cuda_build.find_toolkit()
    assert toolkit is None and "12.4" in reason and "12.8" in reason
    monkeypatch.setattr(cuda_build, "_nvcc_candidates", lambda: [])
    toolkit, reason = cuda_build.find_toolkit()
    assert toolkit is None and "not found" in reason


# ---- the source distribution ------------------------------------------------------------------


def _copy_of_tree(tmp_path: Path) -> Path:
    """setuptools writes its egg-info beside the sources, so builds run in a copy."""
    tree = tmp_path / "tree"
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns(*SKIPPED, "*.egg-info", "*.so", "_build_info.json")
    )
    return tree


def _setup_py(tree: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=tree,
        env={**os.environ, "TQ4_BUILD_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_source_distribution_has_everything_a_build_needs(tmp_path):
    tree = _copy_of_tree(tmp_path)
    _setup_py(tree, "sdist", "--dist-dir", str(tmp_path))
    (archive,) = tmp_path.glob("tq4-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    needed = "LICENSE README.md CHANGELOG.md CMakeLists.txt pyproject.toml setup.py sources.json".split()
    needed += [
        path.relative_to(ROOT).as_posix()
        for folder in ("csrc", "cmake", "python", "scripts", "third_party", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not set(path.parts) & SKIPPED and ".egg-info" not in str(path)
        if path.suffix not in (".pyc", ".so") and path.name != "_build_info.json"
    ]
    assert not sorted(set(needed) - names)
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build_info.json"))]


def test_installed_package_has_every_module(tmp_path):
    tree = _copy_of_tree(tmp_path)
    _setup_py(tree, "build_py", "--build-lib", str(tmp_path / "lib"))
    built = {path.relative_to(tmp_path / "lib") for path in (tmp_path / "lib").rglob("*") if path.is_file()}
    wanted = {path.relative_to(tree / "python") for path in (tree / "python" / "tq4").rglob("*.py")}
    assert wanted <= built
    assert {path.name for path in built - wanted} == {"py.typed", "_build_info.json"}
    info = json.loads((tmp_path / "lib" / "tq4" / "_build_info.json").read_text())
    assert info["cuda_extension"] is False and "TQ4_BUILD_CUDA=0" in info["reason"]


def test_building_without_nvcc_is_refused_when_it_was_asked_for(tmp_path):
    tree = _copy_of_tree(tmp_path)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import cuda_build; cuda_build._nvcc_candidates = lambda: []; "
            "import runpy, sys; sys.argv = ['setup.py', 'build']; runpy.run_path('setup.py')",
        ],
        cwd=tree,
        env={**os.environ, "TQ4_BUILD_CUDA": "1", "PYTHONPATH": str(tree / "scripts")},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "TQ4_BUILD_CUDA=1, but nvcc was not found" in done.stderr


# ---- the extension ----------------------------------------------------------------------------


@pytest.fixture
def extension() -> Path:
    path = PACKAGE / "_C.so"
    if not path.exists():
        pytest.skip("no CUDA extension was built (no nvcc, or TQ4_BUILD_CUDA=0)")
    return path


def _tool(name: str, *arguments: str) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"no {name}")
    return subprocess.run([name, *arguments], capture_output=True, text=True, check=True).stdout


def test_extension_depends_on_no_cuda_library(extension):
    needed = re.findall(r"NEEDED.*\[(.*)\]", _tool("readelf", "-d", str(extension)))
    assert "libtorch.so" in needed
    assert not [name for name in needed if "cuda" in name or "cudart" in name or "python" in name]


def test_extension_uses_the_stable_abi_only(extension):
    undefined = re.findall(
        r"^\s+[Uw] (\S+)", _tool("nm", "-D", "--undefined-only", str(extension)), re.MULTILINE
    )
    # Mangled names of torch's C++ namespaces: the stable ABI is plain C.
    assert not [name for name in undefined if name.startswith("_Z") and re.search(r"3c10|5torch|2at\d", name)]
    assert not [name for name in undefined if name.startswith("Py")]
    assert any(name.startswith("aoti_torch_") for name in undefined)
    # Strong, this one would keep the library from loading on a torch without CUDA.
    weak = re.findall(r"^\s+w (\S+)", _tool("nm", "-D", "--undefined-only", str(extension)), re.MULTILINE)
    assert "aoti_torch_get_current_cuda_stream" in weak


def test_extension_loads_on_this_torch_and_implements_every_op(extension):
    code = (
        "import torch, tq4\n"
        f"torch.ops.load_library({str(extension)!r})\n"
        "from tq4.ops import SCHEMAS\n"
        "missing = [name for name in SCHEMAS\n"
        "           if not torch._C._dispatch_has_kernel_for_dispatch_key(f'tq4_cuda::{name}', 'CUDA')]\n"
        "assert not missing, missing\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr


def test_build_info_is_reproducible(extension):
    text = (PACKAGE / "_build_info.json").read_text()
    info = json.loads(text)
    assert info["cuda_extension"] is True and info["archs"] and re.fullmatch(r"\d+\.\d+\.\d+", info["nvcc"])
    assert text == json.dumps(info, indent=1, sort_keys=True) + "\n"
    assert str(ROOT) not in text and not re.search(r"20\d\d-\d\d", text)


# ---- the README and the repository ------------------------------------------------------------


def test_readme_tables_are_those_of_the_records():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "update_readme.py"), "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_commands_exist():
    text = (ROOT / "README.md").read_text()
    commands = set(re.findall(r"\bscripts/\w+(?:\.py)?", text))
    assert {"scripts/demo", "scripts/test"} <= commands
    for command in commands:
        path = ROOT / command
        assert path.exists() and (path.suffix == ".py" or os.access(path, os.X_OK)), command


def test_readme_links_lead_somewhere():
    for path in (ROOT / "README.md", ROOT / "third_party" / "README.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_version_is_the_same_everywhere():
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_nothing_belongs_to_one_machine():
    """No absolute path of a checkout or home directory, in any text file."""
    suspicious = re.compile(r"(?<![\w.$}>])/(?:home|Users|root|work|workspace|mnt)/\w")
    for path in _files(".py", ".cu", ".cuh", ".h", ".cpp", ".md", ".json", ".toml", ".txt", ".cmake", ".in"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not suspicious.search(line) or "suspicious" in line, f"{path}:{number}: {line.strip()}"
