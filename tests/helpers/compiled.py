"""Python in processes of their own, one of which compiles what this one interprets."""

import json
import subprocess
import sys
import textwrap

import aot


def run_python(script: str, *arguments: str, environment: dict | None = None, cwd=None):
    """Run an indented script and return the completed process with its texts."""
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)


def compile_in_process(script: str, *arguments: str):
    """Return what a Python script prints as JSON, run with ``aot`` importable."""
    done = run_python(script, *arguments, environment=aot.compiler_environment())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
