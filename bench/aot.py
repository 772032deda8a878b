"""Compile Triton kernels ahead of time, without a GPU, and report the resources each one needs.

    python bench/aot.py [op ...] [--capability 80 90 100 120] [--every | --widest] [--ttir DIR]

The command prints a JSON list of :class:`Resources`, one per operation, case and architecture, and
its progress on stderr. The cases come from ``aot_cases.py``. Triton cannot compile kernels that
were decorated for its interpreter: in a process with TRITON_INTERPRET=1 call :func:`measure`, which
starts another process without the variable.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aot_cases import OPERATIONS
from aot_types import AotCase

from prfl_fast.kernels.runtime.triton import HAS_TRITON, INTERPRETING

CAPABILITIES = (80, 90, 100, 120)
COMPILABLE = (80, 86, 87, 89, 90, 100, 103, 120, 121)  # LLVM aborts the process for older ones


@dataclasses.dataclass(frozen=True)
class Resources:
    """Hold registers and spilled bytes of a thread and shared bytes of a program of a kernel."""

    op: str
    label: str
    capability: int
    num_warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int


def compile_case(case: AotCase, capability: int) -> Any:
    """Return a case compiled for ``sm_<capability>``; its ``asm`` has ttir, ptx and cubin."""
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
    """Return the path of the ``cuobjdump`` that ships inside triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not path.exists():
        raise RuntimeError(f"{path} is missing: this triton has no NVIDIA backend")
    return str(path)


def resources(op: str, case: AotCase, capability: int, kernel: Any) -> Resources:
    """Return the registers, spills and shared memory of a compiled case."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [cuobjdump(), "-res-usage", cubin.name]
        run = subprocess.run(command, capture_output=True, text=True)
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", run.stdout))
    if run.returncode or usage.keys() != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"{op} {case.label}: {' '.join(command)}: {run.stderr or run.stdout}")
    # A Triton kernel has no local arrays, so every byte on its stack is a spilled register.
    spilled = int(usage["STACK"]) + int(usage["LOCAL"])
    shared = kernel.metadata.shared  # requested at launch, so the cubin does not have it
    registers = int(usage["REG"])
    return Resources(op, case.label, capability, case.num_warps, registers, spilled, shared)


def compiler_environment() -> dict[str, str]:
    """Return the environment of a process that compiles kernels and can import this module."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    folders = [str(Path(__file__).parent), *filter(None, [environment.get("PYTHONPATH")])]
    return environment | {"PYTHONPATH": os.pathsep.join(folders)}


def measure(
    ops: Sequence[str] = (),
    capabilities: Sequence[int] = CAPABILITIES,
    every: bool = False,
    ttir: Path | None = None,
    widest: bool = False,
) -> list[Resources]:
    """Compile the cases of ``ops`` (none named: all) in a new process; return their resources.

    With ``widest`` only the last case of each kernel is compiled, mostly float32 rows of 5120.
    ``ttir`` is a folder for the kernels' Triton IR, ``<op>-<n>-sm_<capability>.ttir``. If the
    process fails, the last line of its stderr is the message of a ``RuntimeError``.
    """
    command = [sys.executable, __file__, *ops, "--capability", *map(str, capabilities)]
    if every:
        command.append("--every")
    if widest:
        command.append("--widest")
    if ttir is not None:
        command += ["--ttir", str(ttir)]
    run = subprocess.run(command, env=compiler_environment(), capture_output=True, text=True)
    if run.returncode:
        lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
        raise RuntimeError(lines[-1])
    return [Resources(**entry) for entry in json.loads(run.stdout)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python bench/aot.py",
        description="Compile kernels without a GPU; print registers, spills and shared bytes.",
    )
    parser.add_argument("ops", nargs="*", help="for example norm_modulate (default: all)")
    parser.add_argument(
        "--capability", type=int, nargs="+", default=CAPABILITIES, choices=COMPILABLE
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--every", action="store_true", help="every combination of flags")
    chosen.add_argument("--widest", action="store_true", help="the last case of each kernel")
    parser.add_argument("--ttir", metavar="DIR", type=Path, help="an existing folder for the IR")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.ops) - OPERATIONS.keys())
    if unknown:
        parser.error(f"no cases of {', '.join(unknown)}; there are {', '.join(sorted(OPERATIONS))}")
    found = []
    try:
        for op in options.ops or sorted(OPERATIONS):
            for capability in options.capability:
                cases = OPERATIONS[op](divmod(capability, 10), options.every)
                if options.widest:
                    cases = list({case.kernel.__name__: case for case in cases}.values())
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
