"""Run the command line: ``python -m prfl_fast.cli``."""

import sys

from prfl_fast.cli.main import main

sys.exit(main())
