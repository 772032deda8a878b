"""Measure prfl_fast: without options, run the default suites at a size that fits the machine.

Tables are printed as suites finish. ``--out`` receives results.json (every measurement, with
commit, versions and command), report.md and the figures. Files are replaced atomically.
"""

import argparse
import json
import os
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import report
import suites
import torch
from harness import PRESETS, ROOT, Context, SuiteResult, UnavailableError, device_name, run_record

from prfl_fast.utils.optional import need
from prfl_fast.utils.quiet import quiet_libraries

BASELINES = ("eager", "compiled", "reference")
REFERENCE_FILE = Path("diffusers_lite/wan/modules/model.py")


class _Parser(argparse.ArgumentParser):
    def format_help(self) -> str:
        title = "suites, with their newest recorded time on two CPU cores (*: only if asked for):"
        self.epilog = "\n".join([title, *_suite_lines(ROOT / "bench" / "results" / "cpu-2core")])
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(argv: list[str] | None = None) -> tuple[Context, tuple[str, ...]]:
    """Return settings and suites of the arguments; exit with status 2 and one line if wrong."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="bench/run.py", description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--suite",
        nargs="+",
        metavar="NAME",
        choices=tuple(suites.DESCRIPTIONS),
        default=list(suites.DEFAULT),
        help=f"suites of the list below; default: {' '.join(suites.DEFAULT)}",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="sizes; unless given, tiny on a CPU and wan1.3b-480p on a GPU (kernels: all of Wan's)",
    )
    parser.add_argument(
        "--baseline",
        metavar="LIST",
        help="comma-separated: eager, compiled, reference:PATH (a checkout of HY-Video-PRFL); "
        "eager,compiled unless given. Naming compiled also compiles every single operation, which "
        "takes minutes on a CPU",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("bench-out"), help="default: bench-out"
    )
    parser.add_argument("--seed", type=int, default=0)
    repeats = "repetitions of the arms of alignment, family and calibrated-rollout"
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help=repeats)
    args = parser.parse_args(argv)

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device; use --device cpu")
    kind = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    if "facts" in args.suite and kind == "cpu":
        parser.error("--suite facts: it measures a GPU, and there is none here; drop it")
    if args.seed < 0:
        parser.error(f"--seed is {args.seed}, expected a non-negative integer")
    if args.seeds < 1:
        parser.error(f"--seeds is {args.seeds}, expected a positive integer")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: {args.out} is a file, expected a folder or a new name")
    baselines, reference = _baselines(parser, args.baseline or "eager,compiled", kind)
    context = Context(
        device=torch.device(kind),
        preset=PRESETS[args.preset or ("tiny" if kind == "cpu" else "wan1.3b-480p")],
        preset_given=args.preset is not None,
        seed=args.seed,
        seeds=args.seeds,
        baselines=baselines,
        reference=reference,
        compile_ops="compiled" in baselines and (kind == "cuda" or args.baseline is not None),
        out=args.out,
        bar=_bar,
    )
    return context, tuple(dict.fromkeys(args.suite))


def _suite_lines(records: Path) -> list[str]:
    """Return a line for each suite: its name, its time in the newest record, its content."""
    times = {}
    runs = [json.loads(path.read_text()) for path in records.glob("*.json")]
    for record in sorted(runs, key=lambda each: each["run"]["date"]):
        seeds = re.search(r"--seeds (\d+)", record["run"]["command"])
        for name, suite in record["suites"].items():
            times[name] = suite["wall_s"], f" ({seeds[1]} seeds)" if seeds else ""
    lines = []
    for name, text in suites.DESCRIPTIONS.items():
        wall, repeats = times.get(name, (None, ""))
        shown = "–" if wall is None else f"{wall:.0f} s" if wall < 90 else f"{wall / 60:.0f} min"
        lines.append(f"  {name:<19}{shown:>6}  {text}{repeats}")
    return lines


def _baselines(parser: _Parser, text: str, kind: str) -> tuple[tuple[str, ...], Path | None]:
    """Return the baselines and the reference's checkout."""
    # Eager results are the reference of every check: measured even if not named.
    baselines, reference = ["eager"], None
    for item in text.split(","):
        name, _, path = item.strip().partition(":")
        if name not in BASELINES or (path and name != "reference"):
            parser.error(f"--baseline: {item.strip()!r} is none of eager, compiled, reference:PATH")
        if name == "reference":
            reference = Path(path).expanduser().absolute()
            if not path or not (reference / REFERENCE_FILE).is_file():
                shown = path or "(no path)"
                parser.error(
                    f"--baseline: {shown} is not a checkout of HY-Video-PRFL: no {REFERENCE_FILE}"
                )
            if kind == "cpu":
                parser.error("--baseline: the reference runs on CUDA only; the device is the CPU")
        if name not in baselines:
            baselines.append(name)
    return tuple(baselines), reference


def _bar(total: int, description: str) -> Any:
    tqdm = need("tqdm", "bench").tqdm
    # disable=None: no bar where the output is not a terminal; the tables tell the progress there.
    return tqdm(total=total, desc=description, leave=False, disable=None, dynamic_ncols=True)


def run_suite(name: str, context: Context) -> dict[str, Any]:
    """Run one suite, print its tables, save its figures; record an error instead of raising it."""
    start = time.perf_counter()
    try:
        torch.manual_seed(context.seed)
        result: SuiteResult = suites.load(name)(context)
        for table in result.tables:
            print(f"\n{report.to_text(table)}", flush=True)
        for file, figure in result.figures.items():
            report.save_figure(context.out / file, figure)
    except Exception as error:
        kind = "" if isinstance(error, UnavailableError) else f"{type(error).__name__}: "
        print(f"{name}: did not finish: {kind}{error}", file=sys.stderr, flush=True)
        wall = round(time.perf_counter() - start, 1)
        return {"error": f"{kind}{error}", "traceback": traceback.format_exc(), "wall_s": wall}
    for problem in result.problems:
        print(f"{name}: check failed: {problem}", file=sys.stderr, flush=True)
    return report.suite_record(result, time.perf_counter() - start)


def main(argv: list[str] | None = None) -> int:
    """Run the suites and return 0 if all finished and every check held, else 1."""
    quiet_libraries()  # before a suite imports diffusers, peft or torchao: they warn at import
    context, names = parse(argv)
    try:
        context.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"bench/run.py: error: --out: {error}", file=sys.stderr)
        return 2
    record: dict[str, Any] = {
        "run": run_record(context, None if argv is None else ["bench/run.py", *argv]),
        "suites": {},
    }
    where = os.path.abspath(context.out)
    print(f"{device_name(context.device)}, preset {context.preset.name}, {where}", flush=True)
    for name in names:
        print(f"\n== {name}: {suites.DESCRIPTIONS[name].lstrip('* ')}", flush=True)
        record["suites"][name] = run_suite(name, context)
        print(f"   {record['suites'][name]['wall_s']} s", flush=True)
        report.write_json(context.out / "results.json", record)
        report.write_markdown(context.out / "report.md", record)
    failed = [n for n, s in record["suites"].items() if "error" in s or s["problems"]]
    print(
        f"\nresults.json, report.md and plots: {context.out}"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
