"""What a wheel and an sdist hold, and what importing the wrong way says."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command, **environment):
    env = {**os.environ, "PRFL_FAST_CUDA": "0", **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """An sdist of the tree and a wheel built from that sdist, so that what the sdist lacks
    shows.
    """
    folder = tmp_path_factory.mktemp("dist")
    built = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder))
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_wheel_installs_kernels_inside_prfl_fast_only(dist):
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"prfl_fast"}
    for file in (ROOT / "kernels").glob("*.py"):
        assert f"prfl_fast/kernels/{file.name}" in names
    for file in (ROOT / "prfl_fast").rglob("*.py"):
        assert str(file.relative_to(ROOT)) in names


def test_sdist_holds_the_sources_of_the_extension(dist):
    (sdist,) = dist.glob("*.tar.gz")
    names = {name.split("/", 1)[1] for name in tarfile.open(sdist).getnames() if "/" in name}
    for file in [*(ROOT / "csrc").iterdir(), ROOT / "LICENSE", ROOT / "kernels" / "__init__.py"]:
        assert str(file.relative_to(ROOT)) in names


def test_installed_wheel_imports_and_leaves_the_name_kernels_free(dist, tmp_path):
    (wheel,) = dist.glob("*.whl")
    target = tmp_path / "site"
    installed = run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(target),
        str(wheel),
    )
    assert installed.returncode == 0, installed.stderr
    code = (
        "import importlib.util, prfl_fast, prfl_fast.kernels as k; "
        f"assert prfl_fast.__file__.startswith({str(target)!r}), prfl_fast.__file__; "
        f"assert k.__file__.startswith({str(target)!r}), k.__file__; "
        "spec = importlib.util.find_spec('kernels'); "
        f"assert spec is None or {str(target)!r} not in str(spec.origin), spec"
    )
    # -S and an explicit path keep an editable install of the same package out of the way.
    paths = os.pathsep.join([str(target), *(p for p in sys.path if "site-packages" in p)])
    ran = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr


def test_kernels_refuses_to_be_a_top_level_package():
    ran = run(sys.executable, "-c", "import kernels", PYTHONPATH=str(ROOT))
    assert ran.returncode == 1
    assert "this package is prfl_fast.kernels" in ran.stderr.splitlines()[-1]


def test_imports_point_downwards():
    """prfl_fast → prfl_fast.kernels → torch/triton: nothing in kernels/ imports the API, no jit
    outside it.
    """
    for file in (ROOT / "kernels").glob("*.py"):
        for line in file.read_text().splitlines():
            if line.lstrip().startswith(("import prfl_fast", "from prfl_fast")):
                assert "prfl_fast.kernels" in line, f"{file.name}: {line}"
    for file in (ROOT / "prfl_fast").rglob("*.py"):
        assert "triton.jit" not in file.read_text(), file


def test_installs_without_triton(tmp_path):
    """Import, doctor's report and an operation, with triton made unimportable."""
    (tmp_path / "triton.py").write_text("raise ImportError('blocked by the test')\n")
    code = (
        "import torch, prfl_fast, prfl_fast.kernels as k; "
        "assert all(c.backend == 'reference' for c in k.report().values()); "
        "x = torch.randn(1, 3, 8, requires_grad=True); k.norm_modulate(x).sum().backward(); "
        "reason = k.report('cuda')['norm_modulate'].reason; "
        "assert 'not installed' in reason, reason"
    )
    ran = run(sys.executable, "-c", code, PYTHONPATH=str(tmp_path), TRITON_INTERPRET="0")
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("value", ["yes", "2"])
def test_prfl_fast_cuda_is_checked(value):
    ran = run(sys.executable, "setup.py", "--version", PRFL_FAST_CUDA=value)
    assert (
        ran.returncode != 0 and f"PRFL_FAST_CUDA is '{value}', expected 0, 1 or auto" in ran.stderr
    )
