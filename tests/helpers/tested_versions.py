"""Run the tests that depend on other packages, and write the versions into docs/models.md.

``lowest-pins`` and ``newest-pins`` print requirements for pip: the lowest declared versions, or no
version. ``lowest`` and ``newest`` run the tests in the present environment and record it under that
name.
"""

import json
import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE, RECORDS = ROOT / "docs" / "models.md", ROOT / "docs" / "tested_versions.json"
MARKS = ("<!-- tested versions -->\n", "<!-- end of tested versions -->")
PACKAGES = ("torch", "diffusers", "peft", "torchao", "bitsandbytes", "safetensors", "pydantic")
TESTS = (
    *("tests/models", "tests/feedback", "tests/training/test_lora.py", "tests/cli/test_main.py"),
    *("tests/data/test_video.py", "tests/data/test_codec.py"),
)
FAKE_CUDA = "tests/kernels/test_fake_cuda.py"  # skipped in a CPU build of torch


def pins(name: str) -> list[str]:
    """Return the packages of the extras: at the declared lower bounds, or of any version."""
    text = (ROOT / "pyproject.toml").read_text()
    extras = re.findall(r"^(?:train|nf4|optim|video) = \[(.*)\]$", text, re.M)
    bounds = re.findall(r'"([^"]+)"', ", ".join(extras))
    return [re.sub(">=.*", "", b) if name == "newest" else b.replace(">=", "==") for b in bounds]


def table() -> str:
    """Return the Markdown table of the recorded runs; empty if there are none."""
    if not RECORDS.exists():
        return ""
    rows = [f"| | {' | '.join(PACKAGES)} | tests |", "|---" * (len(PACKAGES) + 2) + "|"]
    for name, record in json.loads(RECORDS.read_text()).items():
        cells = [record["versions"][package] for package in PACKAGES]
        rows.append(f"| {name} | {' | '.join(cells)} | {record['passed']} passed |")
    return "\n".join(rows) + "\n"


class Count:
    """A plugin of pytest that counts the tests that passed."""

    passed = 0

    def pytest_runtest_logreport(self, report):
        """Count a test whose call passed."""
        self.passed += report.when == "call" and report.passed


def run(name: str) -> int:
    """Run the tests; record the versions and write the table if all pass."""
    import pytest

    count = Count()
    tests = [str(ROOT / test) for test in (*TESTS, FAKE_CUDA)]
    code = pytest.main(["-q", "-m", "slow or not slow", *tests], plugins=[count])
    if code == 0:
        records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
        versions = {package: metadata.version(package) for package in PACKAGES}
        records[name] = {"versions": versions, "passed": count.passed}
        RECORDS.write_text(json.dumps(dict(sorted(records.items())), indent=1) + "\n")
        before, rest = PAGE.read_text().split(MARKS[0])
        PAGE.write_text(before + MARKS[0] + table() + MARKS[1] + rest.split(MARKS[1])[1])
    return int(code)


if __name__ == "__main__":
    name, _, list_pins = sys.argv[1].partition("-")
    sys.exit(print(*pins(name)) if list_pins else run(name))
