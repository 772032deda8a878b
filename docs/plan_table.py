"""Write the table of plans into docs/memory.md: ``python docs/plan_table.py``, about five minutes.

``--model NAME --gpu NAME`` of ``prfl-fast plan --table`` prints single rows.
"""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("memory.md")
MARKED = re.compile(r"(<!-- plans -->\n).*?(<!-- end of plans -->)", re.S)


def main() -> None:
    """Run the command and replace the text between the markers."""
    command = [sys.executable, "-m", "prfl_fast.cli", "plan", "--table"]
    table = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(MARKED.sub(rf"\g<1>{table}\g<2>", page), encoding="utf-8")


if __name__ == "__main__":
    main()
