"""Predict from their machine code what limits the kernels on a GPU; no GPU needed.

    python bench/predict.py [op ...] [--arch 90] [--match TEXT] [--loops] [--json [--record FILE]]
    python bench/predict.py --attention [--json]

The command prints a line for each case: the predicted percent of the copy rate at three DRAM
latencies, resident warps, bytes in flight, and what limits the kernel. ``--json`` prints a list of
predictions instead. ``--attention`` prints the cost of the loops of attention, which bytes do not
limit. With ``--record``, cases whose machine code, grid and model have not changed
are read from the record. See ``machine_code/predict.py`` for what a prediction holds.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aot
from aot_cases import OPERATIONS
from attention_speed import LoopCost, loop_costs
from machine_code.cuda import predict_query_pool
from machine_code.grids import GRIDS
from machine_code.predict import Prediction, predict


def newest_record(folder: Path) -> Path | None:
    """Return the newest record below ``folder`` that holds predictions."""
    found = []
    for path in folder.rglob("*.json"):
        record = json.loads(path.read_text())
        if "cases" in record["suites"].get("machine-code", {}):
            found.append((record["run"]["date"], path))
    return max(found)[1] if found else None


def read_record(path: Path) -> list[Prediction]:
    """Return the predictions of a record."""
    cases = json.loads(path.read_text())["suites"]["machine-code"]["cases"]
    names = {field.name for field in dataclasses.fields(Prediction)}
    cases = [{name: value for name, value in case.items() if name in names} for case in cases]
    return [Prediction(**case | {"shares": tuple(case["shares"]), "listing": ()}) for case in cases]


def find(
    arch: int, ops: Sequence[str] = (), match: str = "", record: Path | None = None
) -> list[Prediction]:
    """Return the predictions of the cases whose label has ``match``, in a new process.

    Kernels of this process may be decorated for the interpreter, which cannot compile them.
    """
    given = [] if record is None else ["--record", str(record)]
    return [
        Prediction(**entry | {name: tuple(entry[name]) for name in ("shares", "listing")})
        for entry in _run([*ops, "--arch", str(arch), "--match", match, *given])
    ]


def find_attention() -> list[LoopCost]:
    """Return the costs of the attention kernels' loops, in a new process."""
    return [LoopCost(**entry) for entry in _run(["--attention"])]


def _run(arguments: Sequence[str]) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, *arguments, "--json"]
    run = subprocess.run(command, env=aot.compiler_environment(), capture_output=True, text=True)
    if run.returncode:
        lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
        raise RuntimeError(lines[-1])
    found: list[dict[str, Any]] = json.loads(run.stdout)
    return found


def _predictions(
    op: str, arch: int, match: str, known: Mapping[str, Prediction]
) -> Iterator[Prediction]:
    for case in OPERATIONS[op](divmod(arch, 10), False):
        found = predict(op, case, arch, known) if match in case.label else None
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
    parser.add_argument("--attention", action="store_true", help="the loops of attention instead")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--record", type=Path, help="results.json of bench/run.py")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.ops) - GRIDS.keys())
    if unknown:
        parser.error(f"no grids of {', '.join(unknown)}; there are {', '.join(sorted(GRIDS))}")
    known = {p.code: p for p in read_record(options.record) if p.code} if options.record else {}
    # Line numbers hold the path of this checkout, which must not change the bytes of a cubin. The
    # variable, unlike Triton's setting in Python, is part of the key of its cache.
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    if options.attention:
        costs = loop_costs()
        lines = [
            f"{c.label}: {c.instructions:.0f} instructions, {c.clocks:.0f} clocks" for c in costs
        ]
        print(
            json.dumps([dataclasses.asdict(c) for c in costs]) if options.json else "\n".join(lines)
        )
        return 0
    every = []
    for op in options.ops or sorted(GRIDS):
        for arch in options.arch:
            for found in _predictions(op, arch, options.match, known):
                every.append(found)
                if not options.json:
                    lines = [describe(found), *(found.listing if options.loops else ())]
                    print("\n".join(lines), flush=True)
    if options.json:
        print(json.dumps([dataclasses.asdict(found) for found in every], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
