"""Run the command line: ``python -m prfl_fast.cli``."""

import sys

from prfl_fast.cli import run

sys.exit(run())
