"""The CUDA C++ extension without a GPU: build, load, schemas, registers."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import aot
import pytest
from compiled import run_python

from prfl_fast.kernels.runtime import cuda_launch as _cuda
from prfl_fast.kernels.runtime.triton import HAS_TRITON

ROOT = Path(__file__).resolve().parents[3]
POOL = "int width, int warps, int cluster, int splits"
SCHEMAS = {
    "query_pool": f"(Tensor x, Tensor queries, {POOL}) -> (Tensor, Tensor)",
    "query_pool_backward": "(Tensor grad, Tensor lse, Tensor delta, Tensor x, Tensor queries, "
    f"bool need_x, bool need_queries, {POOL}) -> (Tensor, Tensor)",
}


def find_nvcc():
    home = Path(os.environ.get("CUDA_HOME", "/nonexistent"), "bin", "nvcc")
    return str(home) if home.exists() else shutil.which("nvcc")


needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc to build the extension")


# Building.
def copy_checkout(folder):
    """Copy the files that setup.py reads, so that a build leaves no trace in the checkout."""
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    for name in ("csrc", "kernels", "prfl_fast"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return copy_checkout(tmp_path_factory.mktemp("copy") / "checkout")


def setup_py(checkout, *arguments, **environment):
    command, env = [sys.executable, "setup.py", "-q", *arguments], os.environ | environment
    return subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)


def write_nvcc(folder, script):
    """Write a compiler for ``CUDA_HOME``, which is returned."""
    path = folder / "cuda" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(folder / "cuda")


WIDTHS = {"query_pool": (64, 128, 256, 320), "query_pool_backward": (64, 128, 256)}


def leave_out_the_kernels(checkout):
    """Let the functions that bindings.cpp calls do nothing: their kernels take nvcc 20 s."""
    path = checkout / "csrc" / "bindings.cpp"
    called = re.findall(r"^(void query_pool_\w+\([^;]*\));", path.read_text(), re.MULTILINE)
    assert len(called) == len(WIDTHS)
    for name in WIDTHS:
        (checkout / "csrc" / f"{name}.cu").unlink()
    bodies = "".join(f"{function} {{}}\n" for function in called)
    path.open("a").write(f"namespace prfl_fast {{\n{bodies}}}\n")


@pytest.fixture(
    scope="module", params=["no kernels", pytest.param("kernels", marks=pytest.mark.slow)]
)
def library(request, tmp_path_factory):
    """Return the path of the extension, built for one architecture."""
    folder = tmp_path_factory.mktemp("build")
    checkout = copy_checkout(folder / "checkout")
    environment = {"PRFL_FAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0a"}
    if request.param == "no kernels":
        leave_out_the_kernels(checkout)
        environment["NVCC_APPEND_FLAGS"] = "-O0"  # 2 of 13 s less: no instruction of it is tested
    arguments = ("build_ext", "--build-lib", folder / "lib")
    build = setup_py(checkout, *arguments, **environment)
    assert build.returncode == 0, build.stderr
    path = folder / "lib" / "prfl_fast" / "kernels" / "_C.so"
    assert path.exists()
    return path


@needs_nvcc
def test_loads_into_this_torch_and_has_its_schemas(library):
    script = f"""
        import os
        from pathlib import Path

        import torch

        # An installed library would register the same operators, and twice is once too often.
        os.environ["PRFL_FAST_CUDA"] = "0"
        from prfl_fast import kernels
        from prfl_fast.kernels.runtime import extension

        del os.environ["PRFL_FAST_CUDA"]
        extension._state = extension.load_extension(Path({str(library)!r}).parent)
        print(extension.extension_loaded(), extension.extension_reason())
        ops = torch.ops.prfl_fast_cuda
        for name in {tuple(SCHEMAS)!r}:
            print(getattr(ops, name).default._schema)
        kernels.set_backend("cuda")
        x, queries = torch.zeros(1, 4, 8), torch.zeros(2, 8)
        pool = (64, 4, 1, 1)
        small = torch.zeros(1, 2)
        for call in (
            lambda: kernels.query_pool(x, queries),
            lambda: ops.query_pool(x, queries, *pool),
            lambda: ops.query_pool_backward(x, small, small, x, queries, True, True, *pool),
        ):
            try:
                call()
            except (ValueError, NotImplementedError) as error:
                print(type(error).__name__, str(error).splitlines()[0])
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PRFL_FAST")}
    done = run_python(script, environment=environment)
    assert done.returncode == 0, done.stderr
    loaded, *lines = done.stdout.splitlines()
    assert loaded == "True loaded _C.so"
    schemas, (refused, *missing) = lines[: len(SCHEMAS)], lines[len(SCHEMAS) :]
    assert schemas == [f"prfl_fast_cuda::{name}{schema}" for name, schema in SCHEMAS.items()]
    assert refused.startswith("ValueError query_pool: backend 'cuda' needs CUDA tensors")
    for name, line in zip(SCHEMAS, missing, strict=True):
        assert line.startswith(f"NotImplementedError Could not run 'prfl_fast_cuda::{name}'")


@needs_nvcc
def test_names_no_folder_and_no_cuda_library(library):
    """Need what the process of any torch has: no search path, no CUDA runtime, no Python."""
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+)\]", dynamic)
    assert "libtorch.so" in needed and "PATH" not in dynamic
    assert not [name for name in needed if re.match("libcuda|libpython|libc10_cuda", name)]


# Kernels: how many instances, and the threads whose registers must fit a multiprocessor.
def _threads(name, width):
    if "query_pool_partial" in name:
        return 32 * _cuda.POOL_MAX_WARPS[width]
    if "query_pool_backward" in name:
        return 32 * _cuda.POOL_BACKWARD_MAX_WARPS[width]
    return 128


# Instances of each width, which are of two dtypes.
SOURCES = {
    "query_pool": {"query_pool_partial": 2},
    "query_pool_backward": {"query_pool_backward": 2},
}


def assert_no_spills(usage, *sources, widest=False):
    """Assert it of ``usage``: (mangled kernel, registers, bytes of stack or spills)."""
    instances = {
        kernel: n * (1 if widest else len(WIDTHS[source]))
        for source in sources
        for kernel, n in SOURCES[source].items()
    }
    if "query_pool" in sources:
        instances["query_pool_merge"] = 1
    assert {kernel: sum(kernel in name for name, *_ in usage) for kernel in instances} == instances
    for name, registers, spilled in usage:
        width = re.search(r"Li(\d+)E", name)
        width = int(width[1]) if width else None
        assert spilled == 0, f"{name} spills {spilled} bytes"
        given = -(-registers // 8) * 8  # registers are given out in eights
        assert given * _threads(name, width) <= 65536, f"{name}: {registers} registers"
        if "query_pool_backward" in name:
            assert given <= _cuda.POOL_BACKWARD_REGISTERS[width], f"{name}: {registers} registers"


def test_only_what_changed_is_compiled_again(checkout, tmp_path):
    """Build twice with a compiler that writes empty files."""
    compile = 'while [ "$1" != -o ]; do shift; done; : > "$2"'
    home = write_nvcc(tmp_path, f'[ "$1" = --version ] && exit; {compile}')
    source, seen = checkout / "csrc" / "query_pool.cu", []
    for _ in range(2):
        arguments = ("build_ext", "--build-lib", tmp_path / "lib")
        build = setup_py(checkout, *arguments, PRFL_FAST_CUDA="1", CUDA_HOME=home)
        assert build.returncode == 0, build.stderr
        seen.append(set((checkout / "build" / "extension").glob("*.o")))
        source.open("a").write("// changed\n")
    (new,) = seen[1] - seen[0]
    assert new.name.startswith("query_pool.cu-")


@needs_nvcc
@pytest.mark.skipif(not HAS_TRITON, reason="cuobjdump comes with triton")
@pytest.mark.slow
@pytest.mark.parametrize("library", ["kernels"], indirect=True)
def test_no_kernel_spills(library):
    command = [aot.cuobjdump(), "-res-usage", library]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", text)
    assert_no_spills([(name, int(r), int(s)) for name, r, s in found], *SOURCES)


def machine_code(path, architecture, output):
    """Compile a source for one architecture; return (kernel, registers, bytes of stack)."""
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    command = [find_nvcc(), "-cubin", "-gencode", code, "-O3", "-std=c++17", "-Xptxas", "-v"]
    command += ["--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", path, "-o", output]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    pattern = r"entry function '(\w+)'.*?(\d+) bytes stack frame.*?Used (\d+) registers"
    return [(name, int(r), int(s)) for name, s, r in re.findall(pattern, text, re.DOTALL)]


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES)
def test_no_kernel_of_the_widest_tokens_spills(source, tmp_path):
    """Compile one width, which takes the most registers: all take nvcc 10 s more."""
    widths, path = WIDTHS[source], tmp_path / f"{source}.cu"
    text = (ROOT / "csrc" / path.name).read_text()
    text, removed = re.subn(rf" *case (?!{widths[-1]}:)\d+: return .*\n", "", text)
    assert removed == len(widths) - 1
    path.write_text(text)
    assert_no_spills(machine_code(path, "90a", tmp_path / "o"), source, widest=True)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("architecture", ["80", "86", "100", "120"])
def test_no_kernel_spills_elsewhere(source, architecture, tmp_path):
    path = ROOT / "csrc" / f"{source}.cu"
    assert_no_spills(machine_code(path, architecture, tmp_path / "o"), source)


def test_architecture_flags(checkout, monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **arguments: None)
    monkeypatch.setenv("PRFL_FAST_CUDA", "0")
    flags = runpy.run_path(str(checkout / "setup.py"))["architecture_flags"]
    assert flags("9.0a") == ["-gencode", "arch=compute_90a,code=sm_90a"]
    assert flags(" 8.0; 12.0+PTX ") == [
        *("-gencode", "arch=compute_80,code=sm_80"),
        *("-gencode", "arch=compute_120,code=sm_120"),
        *("-gencode", "arch=compute_120,code=compute_120"),
    ]
    for wrong in ("Hopper", "8.0;sm_90", "9.0x"):
        with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST has .*expected entries like"):
            flags(wrong)


@pytest.fixture
def broken_nvcc(tmp_path):
    return write_nvcc(tmp_path, "echo this nvcc is broken >&2; exit 3")


def test_auto_survives_a_broken_nvcc(checkout, broken_nvcc, tmp_path):
    arguments = ("bdist_wheel", "--dist-dir", tmp_path, "--bdist-dir", tmp_path / "wheel")
    done = setup_py(checkout, *arguments, PRFL_FAST_CUDA="auto", CUDA_HOME=broken_nvcc)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("prfl_fast-*.whl"))) == 1
    assert done.stderr.count("prfl_fast: CUDA extension skipped: ") == 1
    assert "this nvcc is broken" in done.stderr


def test_required_fails_with_a_broken_nvcc(checkout, broken_nvcc, tmp_path):
    arguments = ("build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "tmp")
    done = setup_py(checkout, *arguments, PRFL_FAST_CUDA="1", CUDA_HOME=broken_nvcc)
    assert done.returncode != 0 and "exit status 3" in done.stderr
