"""Functions in a process of their own."""

import os


def forked(function):
    """Run a function in a forked child and return its exit code; 99 after an exception."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = function()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
