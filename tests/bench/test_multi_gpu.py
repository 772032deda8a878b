"""bench/multi_gpu.sh on two CPU ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_dry_run_writes_doctor_and_layouts(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "bench" / "multi_gpu.sh"), "--dry"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "doctor.json").read_text())["ranks"]["wrong_results"] == []
    for shard in (1, 2):
        found = json.loads((tmp_path / f"shard-{shard}-sequence-2.json").read_text())
        assert found["ranks"] == 2 and len(found["seconds"]) == 1 and found["median_seconds"] > 0
