"""Fixtures of the kernel tests: the backends, tensors past 32-bit offsets, shared parameters."""

import functools

import pytest
import torch
from cuda_cases import install
from cuda_on_cpu import compile_kernel

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
def sparse_file(triton_backend, tmp_path):
    """Return a function that makes float16 zeros of any number in a file without blocks.

    An address computed in 32 bits reads the zeros at its start instead of what was written past
    2³¹ elements.
    """
    if not INTERPRETING:
        pytest.skip("reads a sparse file through the interpreter; a GPU would need 8 GiB")

    def make(elements=2**32):
        with open(tmp_path / "sparse", "wb") as file:
            file.truncate(2 * elements)
        path = str(tmp_path / "sparse")
        return torch.from_file(path, shared=True, size=elements, dtype=torch.float16)

    return make


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """Return a function that gives an emulated CUDA kernel by name; its first use compiles it."""
    folder = tmp_path_factory.mktemp("emulation")
    return functools.cache(lambda name: compile_kernel(name, folder))


@pytest.fixture
def device(libraries, monkeypatch):
    """Return ``device(capability, processors)``: CPU tensors then run as on such a GPU."""
    return functools.partial(install, monkeypatch, libraries)
