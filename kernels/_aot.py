"""Compiles Triton kernels ahead of time, without a GPU, and reads what they would use of one.

    python -m prfl_fast.kernels._aot [op ...] [--capability 80 90 100 120] [--every] [--ttir DIR]

prints a JSON list of :class:`Resources`, one per operation, case and architecture, with progress on
stderr. An operation takes part if its file has ``aot_cases(capability, every) -> list[AotCase]``.
Kernels decorated for Triton's interpreter cannot be compiled: in a process with TRITON_INTERPRET=1
call :func:`measure`, which starts another one without it.
"""

import argparse
import dataclasses
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prfl_fast.kernels._triton import HAS_TRITON, INTERPRETING, AotCase

CAPABILITIES = (80, 90, 100, 120)
COMPILABLE = (80, 86, 87, 89, 90, 100, 103, 120, 121)  # LLVM aborts the process for older ones


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses: registers and spilled bytes of a thread, shared of a program."""

    op: str
    label: str
    capability: int
    num_warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int


def compile_case(case: AotCase, capability: int) -> Any:
    """The compiled kernel (its ``asm`` has ttir, ptx and cubin) of a case for ``sm_<capability>``.

    Raises:
        RuntimeError: Triton is absent, or interpreting.
        ValueError: the case names a parameter the kernel does not have.
    """
    if not HAS_TRITON:
        raise RuntimeError("compiling kernels needs triton: pip install triton")
    if INTERPRETING:
        raise RuntimeError("kernels are decorated for the interpreter: unset TRITON_INTERPRET")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    unknown = sorted((case.types.keys() | case.constexprs.keys()) - set(names))
    if unknown:
        kernel = case.kernel.__name__
        raise ValueError(f"{case.label}: {kernel} has no parameter {', '.join(unknown)}")
    types = [case.types.get(name, "constexpr") for name in names]
    source = ASTSource(
        case.kernel,
        {name: kind.removesuffix(":16") for name, kind in zip(names, types, strict=True)},
        {name: case.constexprs.get(name) for name in names if name not in case.types},
        {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types) if kind.endswith(":16")},
    )
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    if case.maxnreg is not None:
        options["maxnreg"] = case.maxnreg
    return triton.compile(source, target=target, options=options)


def cuobjdump() -> str:
    """Path of the ``cuobjdump`` that ships inside triton.

    Raises:
        RuntimeError: it is not there.
    """
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not path.exists():
        raise RuntimeError(f"{path} is missing: this triton has no NVIDIA backend")
    return str(path)


def resources(op: str, case: AotCase, capability: int, kernel: Any) -> Resources:
    """Registers, spills and shared memory of a compiled case."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [cuobjdump(), "-res-usage", cubin.name]
        run = subprocess.run(command, capture_output=True, text=True)
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", run.stdout))
    if run.returncode or usage.keys() != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"{op} {case.label}: {' '.join(command)}: {run.stderr or run.stdout}")
    # A Triton kernel has no arrays of its own: what is on its stack was spilled.
    spilled = int(usage["STACK"]) + int(usage["LOCAL"])
    shared = kernel.metadata.shared  # asked for at launch, so not in the cubin
    registers = int(usage["REG"])
    return Resources(op, case.label, capability, case.num_warps, registers, spilled, shared)


def operations() -> dict[str, Any]:
    """The modules of this package that have ``aot_cases``, by name."""
    import prfl_fast.kernels as package

    names = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    modules = {name: importlib.import_module(f"prfl_fast.kernels.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "aot_cases")}


def measure(
    ops: Sequence[str] = (),
    capabilities: Sequence[int] = CAPABILITIES,
    every: bool = False,
    ttir: Path | None = None,
) -> list[Resources]:
    """:class:`Resources` of the cases of ``ops`` (none named: all), from a process of its own.

    ``ttir`` is a folder for the kernels' Triton IR, ``<op>-<n>-sm_<capability>.ttir``.

    Raises:
        RuntimeError: that process failed; the message is the last line of its stderr.
    """
    command = [sys.executable, "-m", "prfl_fast.kernels._aot", *ops]
    command += ["--capability", *map(str, capabilities), *(["--every"] if every else [])]
    command += [] if ttir is None else ["--ttir", str(ttir)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
        raise RuntimeError(lines[-1])
    return [Resources(**entry) for entry in json.loads(run.stdout)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line above; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m prfl_fast.kernels._aot",
        description="Compile kernels without a GPU; print registers, spills and shared bytes.",
    )
    parser.add_argument("ops", nargs="*", help="for example norm_modulate (default: all)")
    parser.add_argument(
        "--capability", type=int, nargs="+", default=CAPABILITIES, choices=COMPILABLE
    )
    parser.add_argument("--every", action="store_true", help="every combination of flags")
    parser.add_argument("--ttir", metavar="DIR", type=Path, help="an existing folder for the IR")
    options = parser.parse_args(arguments)
    modules = operations()
    unknown = sorted(set(options.ops) - modules.keys())
    if unknown:
        parser.error(f"no aot_cases in {', '.join(unknown)}; there are {', '.join(modules)}")
    found = []
    try:
        for op in options.ops or modules:
            for capability in options.capability:
                cases = modules[op].aot_cases(divmod(capability, 10), options.every)
                for i, case in enumerate(cases):
                    kernel = compile_case(case, capability)
                    found.append(resources(op, case, capability, kernel))
                    if options.ttir is not None:
                        path = options.ttir / f"{op}-{i}-sm_{capability}.ttir"
                        path.write_text(kernel.asm["ttir"])
                    line = f"{found[-1].registers:4d} registers  sm_{capability} {op} {case.label}"
                    print(line, file=sys.stderr)
    except Exception as error:  # Triton's own failures come as a dozen unrelated types
        print(f"error: {type(error).__name__}: {error}".replace("\n", " "), file=sys.stderr)
        return 1
    print(json.dumps([dataclasses.asdict(entry) for entry in found], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
