"""Fixtures of the kernel tests: the backends, tensors past 32-bit offsets, shared parameters."""

import ctypes
import fcntl
import functools
import os

import pytest
import torch
from cuda_cases import install
from cuda_on_cpu import compile_kernel
from dtypes import FLOATS

from prfl_fast import kernels
from prfl_fast.kernels.runtime.extension import extension_loaded
from prfl_fast.kernels.runtime.registry import OPERATIONS
from prfl_fast.kernels.runtime.triton import INTERPRETING


def pytest_generate_tests(metafunc):
    """Parametrize the tests that classes of :mod:`op_tests` share by what the class describes."""
    if "bad_argument" in metafunc.fixturenames:
        cases = metafunc.cls.bad_arguments
        metafunc.parametrize("bad_argument", cases, ids=[message for _, message in cases])
    if "smoke_backend" in metafunc.fixturenames:
        operation = OPERATIONS[metafunc.cls.op]
        backends = ["reference"]
        if operation.triton is not None:
            backends.append(pytest.param("triton", marks=pytest.mark.triton))
        if operation.cuda is not None:
            reason = "needs the CUDA extension"
            built = pytest.mark.skipif(not extension_loaded(), reason=reason)
            backends.append(pytest.param("cuda", marks=[pytest.mark.gpu, built]))
        metafunc.parametrize("smoke_backend", backends, indirect=True)


def _use(name, device):
    kernels.set_backend(name)
    torch.set_default_device(device)
    yield name
    torch.set_default_device(None)


@pytest.fixture(params=["reference", pytest.param("triton", marks=pytest.mark.triton)])
def backend(request):
    """Run the test twice; Triton on the GPU where there is one, else in its interpreter."""
    on_gpu = request.param == "triton" and torch.cuda.is_available()
    yield from _use(request.param, "cuda" if on_gpu else "cpu")


@pytest.fixture
def smoke_backend(request):
    """Run the test on every backend of the operation, all on the GPU where there is one."""
    yield from _use(request.param, "cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton_device(triton_backend):
    """Run the test on Triton, with tensors made on the GPU where there is one."""
    yield from _use("triton", "cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def sparse_tensor(tmp_path):
    """Return 2³² float16 zeros in a file without blocks.

    An address computed in 32 bits reads the zeros at its start instead of what was written past
    2³¹ elements.
    """
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2 * 2**32)
    return torch.from_file(file.name, shared=True, size=2**32, dtype=torch.float16)


@pytest.fixture
def sparse_storage(triton_backend, sparse_tensor):
    """Return the zeros for the interpreter, which alone reads them."""
    if not INTERPRETING:
        pytest.skip("reads a sparse file through the interpreter; a GPU would need 8 GiB")
    return sparse_tensor


@pytest.fixture(params=FLOATS)
def dtype(request):
    return request.param


@pytest.fixture(params=[(8, 0), (8, 6), (9, 0), (10, 0), (12, 0), (13, 0)])
def capability(request):
    return request.param


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """Return a function that gives an emulated CUDA kernel by name; its first use compiles it.

    The processes of a parallel run share what they compile.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulation"
    folder.mkdir(exist_ok=True)

    @functools.cache
    def get(name):
        with open(folder / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            library = folder / f"{name}.so"
            return ctypes.CDLL(str(library)) if library.exists() else compile_kernel(name, folder)

    return get


@pytest.fixture
def device(libraries, monkeypatch):
    """Return ``device(capability, multiprocessors)``: CPU tensors then run as on such a GPU."""
    return functools.partial(install, monkeypatch, libraries)


@pytest.fixture
def launches(device):
    """Run CPU tensors as on one processor of capability 8.0; return the launches made."""
    return device((8, 0), 1)
