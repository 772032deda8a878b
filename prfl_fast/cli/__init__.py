"""Command line: ``prfl-fast``, or ``python -m prfl_fast.cli``."""

import sys


def run() -> int:
    """Run the command and return its exit code, 130 after Ctrl-C, also during imports."""
    try:
        from prfl_fast.cli.main import main

        return main()
    except KeyboardInterrupt:
        print("prfl-fast: stopped by SIGINT", file=sys.stderr)
        return 130
