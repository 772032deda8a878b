"""End a run cleanly on SIGINT, SIGTERM and SIGHUP."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

_MESSAGE = b"\nprfl-fast: finishing this step, then saving; again to stop at once\n"


@contextlib.contextmanager
def collect_signals(enabled: bool, told: bool = True) -> Iterator[list[signal.Signals]]:
    """Yield a list that receives SIGINT, SIGTERM or SIGHUP in place of the usual handlers.

    If ``told``, the first signal writes a line to stderr. The handlers do not change if ``enabled``
    is False or outside the main thread, nor does that of SIGHUP if it is ignored, as under nohup.
    """
    received: list[signal.Signals] = []
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number: int, frame: object) -> None:
        received.append(signal.Signals(number))
        restore()  # so that a second signal ends the process at once
        if told:
            with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal
                os.write(2, _MESSAGE)  # print() could be interrupted in its own lock

    # Python allows only the main thread to install signal handlers.
    if enabled and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            before[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()
