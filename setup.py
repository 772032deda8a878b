"""Build prfl_fast: pure Python, plus the optional CUDA C++ extension of ``csrc/``.

PRFL_FAST_CUDA=0     never build the extension
PRFL_FAST_CUDA=1     build it or fail
PRFL_FAST_CUDA=auto  (default) build it if nvcc and torch are here; print a failure and go on
TORCH_CUDA_ARCH_LIST architectures, for example "8.0;9.0a" (default below)
MAX_JOBS             parallel nvcc processes
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.extension import Extension

ROOT = Path(__file__).resolve().parent
VERSION = "0.1.0"
DEFAULT_ARCHITECTURES = "8.0;9.0a;10.0;12.0"
MODE = os.environ.get("PRFL_FAST_CUDA", "auto")
if MODE not in ("0", "1", "auto"):
    sys.exit(f"PRFL_FAST_CUDA is {MODE!r}, expected 0, 1 or auto")


def git_revision() -> str:
    """Return the short commit hash, or an empty string outside a checkout."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return ""
    command = ["git", "rev-parse", "--short=9", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def version() -> str:
    """Return ``0.1.0+g<commit>`` in a checkout; in an sdist, the version the checkout wrote."""
    revision = git_revision()
    written = ROOT / "prfl_fast" / "_version.py"
    if not revision and written.exists():
        return re.findall(r'"(.+)"', written.read_text())[0]
    full = f"{VERSION}+g{revision}" if revision else VERSION
    written.write_text(f'__version__ = "{full}"\n')
    return full


def nvcc() -> str | None:
    """Return the path of the CUDA compiler: from CUDA_HOME, else from PATH."""
    home = os.environ.get("CUDA_HOME", "/nonexistent")
    return shutil.which("nvcc", path=os.pathsep.join([f"{home}/bin", os.environ.get("PATH", "")]))


def architecture_flags(listed: str) -> list[str]:
    """Return ``8.0;9.0a+PTX`` as nvcc ``-gencode`` flags."""
    flags = []
    for entry in re.split(r"[;\s]+", listed.strip()):
        number = entry.removesuffix("+PTX").replace(".", "")
        if not re.fullmatch(r"\d+[af]?", number):
            expected = "expected entries like 8.0 or 9.0a+PTX"
            raise ValueError(f"TORCH_CUDA_ARCH_LIST has {entry!r}, {expected}")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if entry.endswith("+PTX"):
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


class BuildExtension(build_ext):
    """Compile ``csrc/*.cu`` with nvcc against torch's stable ABI; a CPU-only torch is enough."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if MODE == "1":
                raise
            print(f"prfl_fast: CUDA extension skipped: {error}", file=sys.stderr)

    def get_ext_filename(self, name: str) -> str:
        return os.path.join(*name.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        compiler = nvcc()
        if compiler is None:
            raise RuntimeError("nvcc was not found (set CUDA_HOME or PATH)")
        torch = find_spec("torch")  # its folder only: the import takes seconds
        if torch is None or torch.origin is None:
            advice = "install torch, then pip install --no-build-isolation ."
            raise RuntimeError(f"torch is not importable: {advice}")
        folder = Path(torch.origin).parent
        include = folder / "include"
        build = ROOT / "build" / "extension"  # pip uses a new build folder in every run
        build.mkdir(parents=True, exist_ok=True)
        flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC"]
        flags += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        flags += [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", f"-I{ROOT / 'csrc'}"]
        flags += architecture_flags(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES)
        headers = sorted((ROOT / "csrc").glob("*.*h"))
        release = subprocess.check_output([compiler, "--version"], text=True)

        def compile_one(source: str) -> str:
            command = [compiler, "-c", source, *flags]
            texts = (Path(p).read_text() for p in (source, *headers))
            seen = "".join((release, repr(command), *texts))
            target = build / f"{Path(source).name}-{hashlib.sha256(seen.encode()).hexdigest()}.o"
            if not target.exists():  # the same compiler, command, source and headers gave it
                subprocess.run([*command, "-o", f"{target}.part"], check=True)
                os.replace(f"{target}.part", target)
            return str(target)

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        # libtorch.so needs libtorch_cuda.so only where there is one: so the weak CUDA symbol of
        # bindings.cpp resolves there and stays null elsewhere. No search path: both libraries are
        # in the process before this one is.
        link = ["-Xlinker", "--no-as-needed", f"-L{folder / 'lib'}"]
        link += ["-ltorch", "-ltorch_cpu"]
        command = [compiler, "-shared", "-cudart", "static", "-o", str(output), *objects, *link]
        subprocess.run(command, check=True)


class Wheel(bdist_wheel):
    """Tag a wheel with the extension for any Python, since that uses no Python ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


sources = sorted(
    str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.c*") if p.suffix in (".cu", ".cpp")
)
extensions = [] if MODE == "0" or not sources else [Extension("prfl_fast.kernels._C", sources)]
if MODE == "0":
    print("prfl_fast: CUDA extension skipped: PRFL_FAST_CUDA=0", file=sys.stderr)

setup(
    version=version(),
    packages=[
        *find_packages(include=["prfl_fast", "prfl_fast.*"]),
        "prfl_fast.kernels",
        *(f"prfl_fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"prfl_fast.kernels": "kernels"},
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel},
)
