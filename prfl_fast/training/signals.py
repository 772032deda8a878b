"""End a run cleanly on SIGINT and SIGTERM."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def collect_signals(enabled: bool) -> Iterator[list[signal.Signals]]:
    """Yield a list that receives SIGINT or SIGTERM in place of the usual handlers.

    The handlers do not change if ``enabled`` is False or outside the main thread.
    """
    received: list[signal.Signals] = []
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number: int, frame: object) -> None:
        received.append(signal.Signals(number))
        restore()  # so that a second signal ends the process at once

    # Python allows only the main thread to install signal handlers.
    if enabled and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()
