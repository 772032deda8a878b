"""Every operation once, forward and backward, on small odd shapes, on the GPU: the program
compute-sanitizer watches.
"""

import sys
from dataclasses import replace

import harness
import torch
from suites import kernels

PRESETS = (
    harness.Preset("small", 96, 2, 160, 1, (3, 6, 10), text_tokens=7),
    harness.Preset("narrow", 1536, 12, 320, 1, (1, 2, 14), text_tokens=7),
)


def main() -> int:
    """0 if every operation matches plain PyTorch."""
    if not torch.cuda.is_available():
        print("bench/sanitize.py: error: PyTorch sees no CUDA device", file=sys.stderr)
        return 2
    status = 0
    for preset in PRESETS:
        context = harness.Context(torch.device("cuda"), preset)
        for case in (
            c for c in kernels.CASES if preset.dim % kernels.POOL_HEADS == 0 or c.op != "query_pool"
        ):
            for name in kernels.backends(case, context):
                variant = replace(
                    case, ours=lambda t, name=name, case=case: kernels.run_on(name, case, t)
                )
                try:
                    error = kernels.verify(variant, context)
                    print(f"{preset.name}: {case.name}, {name}: error {error:.1e}")
                except AssertionError as failure:
                    print(f"{preset.name}: {case.name}, {name}: {failure}", file=sys.stderr)
                    status = 1
    torch.cuda.synchronize()
    return status


if __name__ == "__main__":
    sys.exit(main())
