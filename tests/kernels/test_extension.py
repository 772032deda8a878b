"""The CUDA C++ extension without a GPU: build, load, schema, registers; its kernel on the CPU."""

import ctypes
import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from numerics import assert_within_twice

from prfl_fast.kernels import _aot
from prfl_fast.kernels._triton import HAS_TRITON

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
module = importlib.import_module("prfl_fast.kernels.query_pool")
HALF, BRAIN = torch.float16, torch.bfloat16
SCHEMA = (
    "prfl_fast_cuda::query_pool(Tensor x, Tensor queries, int width, int warps, int cluster, "
    "int splits) -> (Tensor, Tensor)"
)


def find_nvcc():
    home = Path(os.environ.get("CUDA_HOME", "/nonexistent"), "bin", "nvcc")
    return str(home) if home.exists() else shutil.which("nvcc")


needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc to build the extension")
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to emulate CUDA")


# Building.
@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what setup.py reads, so that building leaves no trace in this one."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    for name in ("csrc", "kernels", "prfl_fast"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


def setup_py(checkout, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def library(checkout, tmp_path_factory):
    """Path of the extension, built for one architecture."""
    folder = tmp_path_factory.mktemp("build")
    arguments = ("build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "tmp")
    build = setup_py(checkout, *arguments, PRFL_FAST_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0a")
    assert build.returncode == 0, build.stderr
    path = folder / "lib" / "prfl_fast" / "kernels" / "_C.so"
    assert path.exists()
    return path


@needs_nvcc
def test_loads_into_this_torch_and_has_its_schema(library):
    script = f"""
        import os
        import torch

        # An installed library would register the same operators, and twice is once too often.
        os.environ["PRFL_FAST_CUDA"] = "0"
        from prfl_fast import kernels
        from prfl_fast.kernels import _extension

        del os.environ["PRFL_FAST_CUDA"]
        _extension.__file__ = {str(library)!r}
        _extension._loaded = _extension._load()
        print(_extension.loaded(), _extension.reason())
        print(torch.ops.prfl_fast_cuda.query_pool.default._schema)
        kernels.set_backend("cuda")
        x, queries = torch.zeros(1, 4, 8), torch.zeros(2, 8)
        for call in (
            lambda: kernels.query_pool(x, queries),
            lambda: torch.ops.prfl_fast_cuda.query_pool(x, queries, 64, 4, 1, 1),
        ):
            try:
                call()
            except (ValueError, NotImplementedError) as error:
                print(type(error).__name__, str(error).splitlines()[0])
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PRFL_FAST")}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded, schema, refused, missing = done.stdout.splitlines()
    assert loaded == "True loaded _C.so"
    assert schema == SCHEMA
    assert refused.startswith("ValueError query_pool: backend 'cuda' was asked for")
    assert missing.startswith("NotImplementedError Could not run 'prfl_fast_cuda::query_pool'")


@needs_nvcc
def test_names_no_folder_and_no_cuda_library(library):
    """What it needs is in the process of any torch: no search path, no CUDA runtime, no Python."""
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+)\]", dynamic)
    assert "libtorch.so" in needed and "PATH" not in dynamic
    assert not [name for name in needed if re.match("libcuda|libpython|libc10_cuda", name)]


def assert_no_spills(usage):
    """``usage``: (kernel, registers, spilled bytes) of ``query_pool_partial<T, width>``."""
    assert len(usage) == 8
    for name, registers, spilled in usage:
        width = int(re.search(r"Li(\d+)E", name)[1])
        assert spilled == 0, f"{name} spills {spilled} bytes"
        assert registers * 32 * module.CUDA_MAX_WARPS[width] <= 65536, f"{name}: {registers}"


@needs_nvcc
@pytest.mark.skipif(not HAS_TRITON, reason="cuobjdump comes with triton")
def test_no_kernel_spills(library):
    command = [_aot.cuobjdump(), "-res-usage", library]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\w*query_pool_partial\w*):\s+REG:(\d+) STACK:(\d+)", text)
    assert_no_spills([(name, int(r), int(s)) for name, r, s in found])


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "86", "100", "120"])
def test_no_kernel_spills_elsewhere(architecture, tmp_path):
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    command = [find_nvcc(), "-cubin", "-gencode", code, "-O3", "-std=c++17", "-Xptxas", "-v"]
    command += ["--expt-relaxed-constexpr", ROOT / "csrc" / "query_pool.cu", "-o", tmp_path / "o"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.findall(
        r"entry function '(\w*query_pool_partial\w*)'.*?(\d+) bytes spill stores.*?"
        r"Used (\d+) registers",
        text,
        re.DOTALL,
    )
    assert_no_spills([(name, int(r), int(s)) for name, s, r in found])


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


def test_a_wrong_switch_is_refused(checkout):
    done = setup_py(checkout, "--version", PRFL_FAST_CUDA="yes")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "PRFL_FAST_CUDA is 'yes', expected 0, 1 or auto"


@pytest.fixture
def broken_nvcc(tmp_path):
    path = tmp_path / "cuda" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\necho this nvcc is broken >&2\nexit 3\n")
    path.chmod(0o755)
    return str(tmp_path / "cuda")


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


# The kernel of csrc/query_pool.cu on the CPU: see cuda_emulation.hpp.
def compile_emulation(folder, change=None):
    """The emulated kernel; with a ``change`` to its source only the narrowest bf16 one."""
    source = (ROOT / "csrc" / "query_pool.cu").read_text()
    flags = ["-O2"]
    if change is not None:
        assert source.count(change[0]) == 1
        source = source.replace(*change)
        flags = ["-O1", "-DNARROW"]
    (folder / "query_pool.cu").write_text(source)
    library = folder / "emulation.so"
    # Fortified longjmp takes a switch of stacks for an attack.
    flags += ["-std=c++17", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing"]
    folders = [f"-I{folder}", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
    command = ["g++", *flags, *folders, HERE / "query_pool_emulated.cpp", "-o", library]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    return compile_emulation(tmp_path_factory.mktemp("emulation"))


def emulate(library, x, queries, width, warps, cluster, splits, order=0):
    """``torch.ops.prfl_fast_cuda.query_pool``, threads taking turns in the given order."""
    batch, tokens, dim = x.shape
    heads = len(queries)
    assert queries.dtype == torch.float32 and queries.is_contiguous()
    partial = (batch, splits, heads)
    shapes = (partial, (*partial, 2), (*partial, dim), (batch, heads, dim), (batch, heads))
    buffers = [torch.full(shape, float("nan")) for shape in shapes]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, queries, *buffers)]
    strides = [ctypes.c_int64(s) for s in x.stride()[:2]]
    numbers = (batch, tokens, heads, dim, int(x.dtype == HALF), width, warps, cluster, splits)
    assert library.query_pool_emulated(*pointers, *strides, *numbers, order) == 0
    return tuple(buffers[3:])


@pytest.fixture
def cuda(emulation, monkeypatch):
    """``_cuda`` of the operation on CPU tensors, as if on a device of the given capability."""

    def run(x, queries, capability, processors, order=0):
        launches = []

        def query_pool(*arguments):
            launches.append(module.CudaLaunch(*arguments[2:]))
            return emulate(emulation, *arguments, order=order)

        properties = SimpleNamespace(multi_processor_count=processors)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(module, "capability", lambda device: capability)
        namespace = SimpleNamespace(query_pool=query_pool)
        monkeypatch.setattr(torch.ops, "prfl_fast_cuda", namespace, raising=False)
        return module._cuda(x, queries), launches

    return run


def attention(x, queries):
    """What attention in 16 bits computes: scores, weights and sums rounded to x's dtype."""
    scores = x @ queries.to(x.dtype).t()
    pooled = torch.softmax(scores, dim=1).transpose(1, 2) @ x
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return pooled.to(wide), torch.logsumexp(scores, dim=1).to(wide)


def make(batch, tokens, dim, heads, dtype):
    x = torch.randn(batch, tokens, dim).to(dtype)
    return x, 3 * torch.randn(heads, dim) / dim**0.5


EMULATED = {
    "one token, one head": ((1, 1, 64, 1), (8, 0), 1, (64, 4, 1, 1)),
    "batch, odd D, splits": ((2, 100, 88, 3), (8, 0), 2, (64, 4, 1, 2)),
    "1.3B, 17 tokens": ((1, 17, 1536, 8), (9, 0), 1, (256, 6, 1, 2)),
    "5B, a cluster of two": ((1, 49, 3072, 8), (9, 0), 1, (256, 6, 2, 1)),
    "5B, no clusters": ((1, 20, 3072, 8), (8, 0), 1, (256, 12, 1, 2)),
    "14B, a cluster of four": ((1, 40, 5120, 8), (9, 0), 2, (320, 4, 4, 1)),
    "three groups of heads": ((1, 130, 640, 19), (12, 0), 6, (128, 5, 1, 4)),
    "a cluster of eight": ((1, 18, 8192, 2), (10, 0), 1, (256, 4, 8, 1)),
}


@needs_gxx
@pytest.mark.parametrize("dtype", [BRAIN, HALF])
@pytest.mark.parametrize("case", EMULATED)
def test_the_kernel_computes_the_pool(cuda, case, dtype):
    shape, capability, processors, expected = EMULATED[case]
    x, queries = make(*shape, dtype)
    out, launches = cuda(x, queries, capability, processors)
    assert launches == [module.CudaLaunch(*expected)]
    oracle = attention(x.double(), queries.double())
    for triple in zip(out, attention(x, queries), oracle, strict=True):
        assert_within_twice(*triple)
    # Scores take the queries as they are, so that lse is far better than that of 16-bit attention.
    assert (out[1] - oracle[1]).abs().max() <= 3e-5
    # And pooling with weights rounded to `dtype` is all that is lost of the pool.
    scale = torch.softmax(x.double() @ queries.double().t(), 1).transpose(1, 2) @ x.double().abs()
    assert ((out[0] - oracle[0]).abs() <= torch.finfo(dtype).eps * scale).all()


@needs_gxx
@pytest.mark.parametrize(
    "shape, launch",
    [
        ((2, 70, 96, 9), (64, 4, 1, 2)),
        ((1, 40, 1280, 8), (320, 4, 1, 1)),
        ((1, 50, 1000, 8), (64, 4, 4, 2)),
    ],
)
def test_the_result_does_not_depend_on_the_order_of_threads(emulation, shape, launch):
    x, queries = make(*shape, BRAIN)
    first = emulate(emulation, x, queries, *launch)
    for order in (1, 2, 3):
        again = emulate(emulation, x, queries, *launch, order=order)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@needs_gxx
@pytest.mark.parametrize(
    "before, after, cluster",
    [
        ("      __syncthreads();\n", "", 1),
        ("      cluster_sync();\n", "", 2),
        ("__syncthreads_or(moved)", "moved", 1),
        ("((parity * cluster + rank)", "(rank", 2),
    ],
    ids=["scores", "scores of a cluster", "weights", "two sets of scores"],
)
def test_the_emulation_notices_a_missing_barrier(tmp_path, before, after, cluster):
    library = compile_emulation(tmp_path, (before, after))
    x, queries = make(1, 90, 256, 8, BRAIN)
    x[:, :45] *= 0.1  # so that the maximum moves on the way
    expected = attention(x.double(), queries.double())[0]
    errors = []
    for order in (0, 1, 2, 3):
        pooled, _ = emulate(library, x, queries, 64, 4, cluster, 1, order=order)
        errors.append((pooled - expected).abs().max().item())
    assert not all(error < 0.01 for error in errors), errors


@needs_gxx
def test_extreme_scores(cuda):
    """One token takes all, first or last; and scores of the same size everywhere."""
    x, queries = make(1, 60, 64, 2, HALF)
    for place in (0, 59):
        spiked = x.clone()
        spiked[:, place] = queries.half()[0] * 40
        (pooled, lse), _ = cuda(spiked, queries, (8, 0), 1)
        expected = attention(spiked.double(), queries.double())
        torch.testing.assert_close(pooled.double(), expected[0], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(lse.double(), expected[1], rtol=1e-5, atol=1e-5)
    (pooled, _), _ = cuda(x, torch.zeros(2, 64), (8, 0), 1)
    torch.testing.assert_close(pooled[0, 0], x[0].float().mean(0), rtol=1e-5, atol=1e-5)


@needs_gxx
def test_a_nan_in_x_is_a_nan_in_the_pool(cuda):
    x, queries = make(1, 40, 64, 2, BRAIN)
    x[0, 7, 3] = float("nan")
    (pooled, lse), _ = cuda(x, queries, (8, 0), 1)
    assert pooled.isnan().all() and lse.isnan().all()


@needs_gxx
@pytest.mark.parametrize(
    "view", [lambda x: x[..., 8:72], lambda x: x.transpose(0, 1)[..., :64], lambda x: x[:1, ::2]]
)
def test_strided_tokens(cuda, view):
    x, queries = make(20, 19, 80, 4, BRAIN)
    x = view(x)
    queries = queries[:, : x.shape[-1]].contiguous()
    out, launches = cuda(x, queries, (8, 0), 1)
    assert len(launches) == 1
    dense, _ = cuda(x.contiguous(), queries, (8, 0), 1)
    assert all(torch.equal(a, b) for a, b in zip(out, dense, strict=True))


@pytest.mark.parametrize(
    "view, capability",
    [
        (lambda x: x[..., 1:65], (9, 0)),
        (lambda x: x[..., :60], (9, 0)),
        (lambda x: x[..., :64], (7, 5)),
        (lambda x: x[..., :64].float(), (9, 0)),
    ],
)
def test_what_the_kernel_cannot_take_goes_elsewhere(monkeypatch, view, capability):
    monkeypatch.setattr(module, "HAS_TRITON", False)
    monkeypatch.setattr(module, "capability", lambda device: capability)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=2)
    )
    x, queries = make(2, 9, 72, 4, BRAIN)
    x = view(x)
    queries = queries[:, : x.shape[-1]]
    given, expected = module._cuda(x, queries), module.reference(x, queries)
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dim", [8, 64, 1000, 1536, 2048, 3072, 4096, 5120, 8192])
def test_launches_fit_the_device(dim, capability):
    launch = module.cuda_launch_config(2, 32760, 12, dim, BRAIN, capability, 132)
    if launch is None:
        assert capability < (9, 0) and dim > 2048
        return
    assert launch.width * launch.warps * launch.cluster >= dim
    assert 4 <= launch.warps <= module.CUDA_MAX_WARPS[launch.width]
    assert launch.cluster == 1 or capability >= (9, 0)
    shared = module.cuda_shared_bytes(launch.width, launch.warps, launch.cluster)
    assert shared <= (99 if capability in ((8, 6), (8, 9), (12, 0)) else 163) * 1024
    assert 1 <= launch.splits * launch.cluster * 2 * 2 <= 2 * 132


def test_what_no_launch_fits():
    for dim, dtype, capability in ((65, BRAIN, (9, 0)), (64, torch.float32, (9, 0))):
        assert module.cuda_launch_config(1, 9, 8, dim, dtype, capability, 132) is None
    assert module.cuda_launch_config(1, 9, 8, 64, BRAIN, (7, 5), 72) is None
    assert module.cuda_launch_config(1, 9, 8, 32768, BRAIN, (9, 0), 132) is None
    assert module.cuda_launch_config(65536, 9, 8, 64, BRAIN, (9, 0), 132) is None


@needs_gxx
def test_python_and_c_agree_on_the_limits(emulation):
    emulation.query_pool_shared_bytes.restype = ctypes.c_int64
    for width, warps in module.CUDA_MAX_WARPS.items():
        assert emulation.query_pool_max_warps(width) == warps
        for cluster in (1, 2, 8):
            expected = emulation.query_pool_shared_bytes(width, warps, cluster)
            assert module.cuda_shared_bytes(width, warps, cluster) == expected
