"""Find and run CUDA's command line tools."""

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from quick.worker import Late, Worker


def tool_path(name: str) -> str | None:
    """Return the path of a CUDA tool: on PATH, or in the usual folders."""
    places = [shutil.which(name)]
    for pattern in (f"cuda*/bin/{name}", f"cuda*/compute-sanitizer/{name}"):
        places += sorted(map(str, Path("/usr/local").glob(pattern)), reverse=True)
    places += sorted(map(str, Path("/opt/nvidia").glob(f"nsight-compute/*/{name}")), reverse=True)
    return next((p for p in places if p and os.access(p, os.X_OK)), None)


def run_tool(
    worker: Worker, file: str, command: list[str], **environment: str
) -> tuple[dict[str, Any], str]:
    """Run a profiler on this program and return a record and its text, even if it is stopped."""
    begin, path = time.perf_counter(), worker.out / file
    environment = os.environ | environment
    with open(path, "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            status: Any = process.wait(max(1.0, worker.left() - 2))
        except (subprocess.TimeoutExpired, Late):
            process.terminate()
            try:
                process.wait(3)
            except subprocess.TimeoutExpired:
                process.kill()
            status = "cut off by the stage's time"
    text = path.read_text(errors="replace")
    return {"seconds": time.perf_counter() - begin, "status": status}, text
