"""Stop a command on Ctrl-C or SIGTERM, at a place where it is safe to stop."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

_checks: list[Callable[[], None]] = []  # that of the outermost context


class Terminated(KeyboardInterrupt):
    """Error that SIGTERM raises, as Ctrl-C raises ``KeyboardInterrupt``."""


def _terminate(number: int, frame: object) -> NoReturn:
    raise Terminated


# The handlers that raise an exception, by signal.
_HANDLERS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _terminate}


@contextlib.contextmanager
def termination_raised() -> Iterator[None]:
    """Raise :class:`Terminated` on SIGTERM in this context, so that temporary files are removed.

    Outside the main thread, or with another handler than the system's, nothing changes.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def interrupts_held() -> Iterator[Callable[[], None]]:
    """Yield a function that raises ``KeyboardInterrupt`` if Ctrl-C was pressed in this context.

    Python drops a ``KeyboardInterrupt`` that is raised in a callback of a weak reference, and in a
    dispatch of fake tensors it can abort the process. Here SIGINT sets a flag only, which is read
    by the function and at the end of the context. A second Ctrl-C interrupts at once. SIGTERM does
    the same where it raises :class:`Terminated`. A nested context shares the flag. Outside the main
    thread, or with other handlers than those, nothing changes.
    """
    received: list[int] = []
    held = {number: own for number, own in _HANDLERS.items() if signal.getsignal(number) is own}

    def check() -> None:
        if received:
            raise Terminated if received[0] == signal.SIGTERM else KeyboardInterrupt

    def restore() -> None:
        for number, handler in held.items():
            signal.signal(number, handler)

    def receive(number: int, frame: object) -> None:
        received.append(number)
        restore()

    main = threading.current_thread() is threading.main_thread()
    if main and _checks:
        yield _checks[0]
        return
    if not main or not held:
        yield check
        return
    for number in held:
        signal.signal(number, receive)
    _checks.append(check)
    try:
        yield check
    finally:
        restore()
        _checks.remove(check)
        check()  # before any other error, which the interrupt may have caused
