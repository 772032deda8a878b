"""Kill ``prfl-fast encode`` at chosen moments in forked children, and continue it.

Arguments: the folder of results, the number of kills, and those of the command without OUT. A child
is killed before or after its n-th rename of a file, for n from 1 on; the next one continues its
folder. Forking saves the imports; with one thread, no thread pool is forked.
"""

import os
import signal
import sys

import torch
import transformers  # noqa: F401 - imported once for all children
from diffusers import AutoencoderKLWan  # noqa: F401

from prfl_fast.cli.main import main


def kill_at(count, before):
    """Kill this process at its ``count``-th rename."""
    original, calls = os.replace, 0

    def replace(*paths):
        nonlocal calls
        calls += 1
        if calls == count and before:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*paths)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace


def run(arguments, count=0, before=False):
    """Return the exit status of the command in a child; it is killed if ``count`` is not 0."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            if count:
                kill_at(count, before)
            code = main(arguments)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, kills, clips, *options = sys.argv[1:]
    assert run(["encode", clips, f"{out}/whole", *options]) == 0
    for number in range(int(kills)):
        arguments = ["encode", clips, f"{out}/{number}", *options]
        status = run(arguments, number // 2 + 1, number % 2 == 0)
        assert status == -signal.SIGKILL, f"kill {number}: status {status}"
        assert run(arguments) == 0
    print("done")
