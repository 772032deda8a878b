"""Predict from their machine code what limits the kernels on a GPU; no GPU needed.

    python bench/predict.py [op ...] [--arch 90] [--match TEXT] [--loops] [--json]

The command prints a line for each case: the predicted percent of the copy rate at three DRAM
latencies, resident warps, bytes in flight, and what limits the kernel. ``--json`` prints a list of
predictions instead. See ``machine_code/predict.py`` for what a prediction holds.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence

import aot
from aot_cases import OPERATIONS
from machine_code.cuda import predict_query_pool
from machine_code.grids import GRIDS
from machine_code.predict import Prediction, predict


def find(arch: int, ops: Sequence[str] = (), match: str = "") -> list[Prediction]:
    """Return the predictions of the cases whose label has ``match``, in a new process.

    Kernels of this process may be decorated for the interpreter, which cannot compile them.
    """
    command = [sys.executable, __file__, *ops, "--arch", str(arch), "--match", match, "--json"]
    run = subprocess.run(command, env=aot.compiler_environment(), capture_output=True, text=True)
    if run.returncode:
        lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
        raise RuntimeError(lines[-1])
    return [
        Prediction(**entry | {name: tuple(entry[name]) for name in ("shares", "listing")})
        for entry in json.loads(run.stdout)
    ]


def _predictions(op: str, arch: int, match: str) -> Iterator[Prediction]:
    for case in OPERATIONS[op](divmod(arch, 10), False):
        found = predict(op, case, arch) if match in case.label else None
        if found is not None:
            yield found
    if op == "query_pool":
        yield from predict_query_pool(arch, match)


def describe(found: Prediction) -> str:
    """Return one line about a prediction."""
    pressed = " ".join(f"{pipe} {used}" for pipe, used in found.pressure.items() if used >= 40)
    return (
        f"{'/'.join(map(str, found.shares)):>11} %  sm_{found.arch} {found.name}: "
        f"{found.registers} registers, {found.spilled_bytes} spilled, "
        f"{found.resident_blocks} blocks = "
        f"{found.resident_warps} warps, {found.flying_kb} kB in flight, {found.barriers} barriers, "
        f"{found.waves} waves, {pressed or 'no pipe pressed'}; {found.limits}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", help="for example rms_norm (default: all)")
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=aot.CAPABILITIES)
    parser.add_argument("--match", default="", help="only cases whose label has this text")
    parser.add_argument("--loops", action="store_true", help="also print the token loops' accesses")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.ops) - GRIDS.keys())
    if unknown:
        parser.error(f"no grids of {', '.join(unknown)}; there are {', '.join(sorted(GRIDS))}")
    every = []
    for op in options.ops or sorted(GRIDS):
        for arch in options.arch:
            for found in _predictions(op, arch, options.match):
                every.append(found)
                if not options.json:
                    lines = [describe(found), *(found.listing if options.loops else ())]
                    print("\n".join(lines), flush=True)
    if options.json:
        print(json.dumps([dataclasses.asdict(found) for found in every], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
