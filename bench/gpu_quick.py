"""Gather the most valuable evidence about prfl_fast on one GPU in nine minutes.

    python bench/gpu_quick.py [--minutes 9] [--stages env,smoke,…] [--device cuda|cpu] [--dry]

The most valuable stages come first. ``bench/gpu.sh quick`` installs what is missing and calls this
program. ``--dry`` takes tiny shapes and seconds, to try it on a CPU; ``--list`` names the stages.

The output folder (--out, else $OUT, else bench-out) gets

    gpu_quick.jsonl   one JSON object a line, on disk at once: begin, result, failed, skipped
    gpu_quick.txt     the table that is also printed at the end and after SIGINT or SIGTERM
    ncu.txt, memcheck.txt, doctor.txt   the output of those tools

One process supervises and never touches the GPU; another works. A case that raises is recorded with
the end of its traceback. A case that kills, hangs or poisons its process is recorded as failed, and
a new process continues with the next one. Stages end on a schedule; time that one leaves over goes
to those after it.

Times: ``ms`` is the median GPU time by CUDA events, the launches hidden behind a pause;
``exposed`` counts runs where they were not hidden; ``host_ms`` is the call's time on the host;
``wall_ms`` is without the pause. Errors are ‖a - b‖ / ‖b‖ against float64. Clocks are only read.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from quick.journal import Journal
from quick.supervisor import STAGES, supervise


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options; exit with status 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9, help="wall time, at most")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of " + ",".join(STAGES))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, to try this program")
    parser.add_argument("--out", default=os.environ.get("OUT", "bench-out"))
    parser.add_argument("--list", action="store_true", help="name the stages and stop")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.stages = options.stages.split(",")
    unknown = set(options.stages) - set(STAGES)
    if unknown:
        known = ", ".join(STAGES)
        parser.error(f"--stages has {', '.join(sorted(unknown))}, expected some of {known}")
    return options


def work(options: argparse.Namespace) -> int:
    """Run the stages, or the probe that another process requested."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor decides
    # torch is imported here, so that the supervisor never holds a CUDA context.
    import torch
    import torch._dynamo  # lazily imported by operators; a stage's alarm must not interrupt that
    from quick.tool_stages import STAGE_FUNCTIONS, follow_parent, probe
    from quick.worker import Worker

    # The parents of these probes are the launchers of ncu and compute-sanitizer.
    if not (options.probe or "").startswith(("profile:", "tiny:")):
        follow_parent()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu_quick.py: PyTorch sees no CUDA device; --device cpu --dry tries the program",
            file=sys.stderr,
        )
        return 2
    if options.probe:
        probe(options)
        return 0
    journal = Journal(Path(options.out) / "gpu_quick.jsonl")
    Worker(journal, json.loads(options.worker), options.device, options.dry).run(STAGE_FUNCTIONS)
    return 0


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.list:
        print("\n".join(f"{name} {seconds} s" for name, (seconds, _) in STAGES.items()))
        return 0
    return work(options) if options.worker or options.probe else supervise(options)


if __name__ == "__main__":
    sys.exit(main())
