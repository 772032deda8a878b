"""What a wheel and an sdist hold, and what importing the wrong way says."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command, cwd=ROOT, **environment):
    env = {**os.environ, "PRFL_FAST_CUDA": "0", **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def run_bare(code, cwd, *paths):
    """Run code with -S and an explicit path, which keeps an editable install out of the way."""
    paths = os.pathsep.join([*paths, *(p for p in sys.path if "site-packages" in p)])
    return run(sys.executable, "-S", "-c", code, cwd=cwd, PYTHONPATH=paths)


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Build an sdist of the tree, and a wheel from it: a file that the sdist lacks is missed."""
    folder = tmp_path_factory.mktemp("dist")
    built = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder))
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_wheel_installs_kernels_inside_prfl_fast_only(dist):
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"prfl_fast"}
    for file in (ROOT / "kernels").rglob("*.py"):
        assert f"prfl_fast/{file.relative_to(ROOT)}" in names
    for file in (ROOT / "prfl_fast").rglob("*.py"):
        assert str(file.relative_to(ROOT)) in names


def test_sdist_holds_the_sources_of_the_extension(dist):
    (sdist,) = dist.glob("*.tar.gz")
    names = {name.split("/", 1)[1] for name in tarfile.open(sdist).getnames() if "/" in name}
    for file in [*(ROOT / "csrc").iterdir(), ROOT / "LICENSE", ROOT / "kernels" / "__init__.py"]:
        assert str(file.relative_to(ROOT)) in names


@pytest.mark.slow
def test_installed_wheel_imports_and_leaves_the_name_kernels_free(dist, tmp_path):
    (wheel,) = dist.glob("*.whl")
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)  # as pip does, and it adds the command
    code = (
        "import importlib.util, prfl_fast, prfl_fast.kernels as k; "
        f"assert prfl_fast.__file__.startswith({str(target)!r}), prfl_fast.__file__; "
        f"assert k.__file__.startswith({str(target)!r}), k.__file__; "
        "spec = importlib.util.find_spec('kernels'); "
        f"assert spec is None or {str(target)!r} not in str(spec.origin), spec"
    )
    ran = run_bare(code, tmp_path, str(target))
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc to build the extension")
def test_a_wheel_with_the_extension_installs_without_nvcc(tmp_path):
    """Build what ``make wheel`` builds, and load it with neither nvcc nor CUDA_HOME."""
    pip = f"{sys.executable} -m pip"
    build = f"{pip} wheel -q --no-deps --no-build-isolation -w {tmp_path} {ROOT}"
    built = run(*build.split(), PRFL_FAST_CUDA="1", TORCH_CUDA_ARCH_LIST="")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-linux_" in wheel.name and wheel.stat().st_size < 20e6
    target = tmp_path / "site"
    bare = {"PATH": "/usr/bin:/bin", "CUDA_HOME": "", "PRFL_FAST_CUDA": "auto"}
    install = f"{pip} install -q --no-deps --target {target} {wheel}"
    installed = run(*install.split(), **bare)
    assert installed.returncode == 0, installed.stderr
    library = target / "prfl_fast" / "kernels" / "_C.so"
    for arch in ("80", "90a", "100", "120"):
        assert f"sm_{arch}".encode() in library.read_bytes()
    code = "from prfl_fast.kernels.runtime import extension as e; print(e.extension_reason())"
    paths = os.pathsep.join([str(target), *(p for p in sys.path if "site-packages" in p)])
    ran = run(sys.executable, "-S", "-c", code, cwd=tmp_path, PYTHONPATH=paths, **bare)
    assert ran.stdout == "loaded _C.so\n", ran.stderr


def test_kernels_is_no_top_level_package():
    """In the checkout's root the folder looks like a missing package, or gives way to another."""
    for line in ("from kernels import get_kernel", "import kernels; kernels.norm_modulate"):
        ran = run(sys.executable, "-c", line, PYTHONPATH=str(ROOT))
        assert ran.returncode == 1
        error = ran.stderr.splitlines()[-1]
        assert error.startswith("ModuleNotFoundError: No package 'kernels'"), error
        assert "installs as prfl_fast.kernels" in error
    ran = run(sys.executable, "-c", "import kernels.layer", PYTHONPATH=str(ROOT))
    assert "ModuleNotFoundError: No module named 'kernels.layer'" in ran.stderr


def test_an_installed_package_kernels_is_found_from_the_root(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__, get_kernel = '0.1', 3\n")
    (tmp_path / "kernels" / "layer.py").write_text("Mode = 4\n")
    code = (
        "import importlib.util, kernels; from kernels import get_kernel; "
        "from kernels.layer import Mode; "
        "print(get_kernel, Mode, kernels.__version__, importlib.util.find_spec('kernels').origin)"
    )
    ran = run(sys.executable, "-c", code, PYTHONPATH=str(tmp_path))
    assert ran.stdout.split() == ["3", "4", "0.1", str(tmp_path / "kernels" / "__init__.py")]


@pytest.mark.slow
def test_diffusers_imports_from_the_root():
    """Transformers and diffusers probe for a package `kernels`."""
    pytest.importorskip("diffusers")
    code = "from diffusers import WanTransformer3DModel; import prfl_fast.kernels as k; k.rms_norm"
    ran = run(sys.executable, "-c", code)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_the_checkout_runs_without_being_installed(tmp_path):
    """Python in the root of a clone imports the kernels beside prfl_fast, or says why not."""
    for name in ("prfl_fast", "kernels"):
        ignore = shutil.ignore_patterns("_version.py", "*.so", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    code = "import prfl_fast; print(prfl_fast.__version__, prfl_fast.kernels.__file__)"
    ran = run_bare(code, tmp_path)
    assert ran.stdout.split() == ["0+checkout", str(tmp_path / "kernels" / "__init__.py")]
    shutil.rmtree(tmp_path / "kernels")
    ran = run_bare(code, tmp_path)
    assert "has no kernels: install it with pip install ." in ran.stderr.splitlines()[-1]


@pytest.mark.slow
def test_installs_without_triton(tmp_path):
    """Import, doctor's report and an operation, with triton made unimportable."""
    (tmp_path / "triton.py").write_text("raise ImportError('blocked by the test')\n")
    code = (
        "import torch, prfl_fast, prfl_fast.kernels as k; "
        "from prfl_fast.kernels.runtime import registry; "
        "assert all(c.backend == 'reference' for c in registry.report().values()); "
        "x = torch.randn(1, 3, 8, requires_grad=True); k.norm_modulate(x).sum().backward(); "
        "reason = registry.report('cuda')['norm_modulate'].reason; "
        "assert 'not installed' in reason, reason"
    )
    ran = run(sys.executable, "-c", code, PYTHONPATH=str(tmp_path), TRITON_INTERPRET="0")
    assert ran.returncode == 0, ran.stderr


@pytest.mark.cases(1)
@pytest.mark.parametrize("value", ["yes", "2"])
def test_prfl_fast_cuda_is_checked(value):
    ran = run(sys.executable, "setup.py", "--version", PRFL_FAST_CUDA=value)
    assert ran.returncode == 1
    last = ran.stderr.splitlines()[-1]
    assert last == f"PRFL_FAST_CUDA is '{value}', expected 0, 1 or auto"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_hands_the_settings_of_pip_to_uv(tmp_path):
    """Mirrors and constraints; a variable of pip is preferred to its file."""
    shown = 'echo "$UV_FIND_LINKS|$UV_DEFAULT_INDEX|$UV_CONSTRAINT|$*" >> ' + str(
        tmp_path / "shown"
    )
    scripts = {
        "python": 'echo "pip $*"',
        "uv": f"{shown}; false",
    }
    (tmp_path / "bin").mkdir()
    for name, text in scripts.items():
        script = tmp_path / "bin" / name
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
    # As `pip config list` prints them, as Python's literals: with a line break between two values,
    # in the other quotes around an apostrophe, and with an escape beside both kinds of quotes.
    stored = {
        "find-links": "/wheels\n/o'hara",
        "index-url": 'https://mirror/o\'hara/"new"',
        "constraint": "old.txt",
    }
    lines = [f"global.{name}={value!r}\n" for name, value in stored.items()]
    (tmp_path / "pip-settings").write_text("".join(lines))
    settings = {"PIP_FIND_LINKS": "", "PIP_INDEX_URL": "", "PIP_CONSTRAINT": "own.txt"}
    command = [
        "make",
        "-s",
        f"VENV={tmp_path}",
        "--eval",
        "some: ; @$(call install,one two)",
        "some",
    ]
    made = run(*command, **settings)
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines() == [
        "install one two",
        "pip -m pip install --no-compile one two",
    ]
    given = f"pip install -q --python {tmp_path}/bin/python one two"
    expected = f"/wheels /o'hara|{stored['index-url']}|own.txt|{given}\n"
    assert (tmp_path / "shown").read_text() == expected
