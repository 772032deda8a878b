"""Stop a command on Ctrl-C or SIGTERM, at a place where it is safe to stop."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

_checks: list[Callable[[], None]] = []  # that of the outermost context


class Terminated(KeyboardInterrupt):
    """Error that SIGTERM raises, as Ctrl-C raises ``KeyboardInterrupt``."""


_received: list[int] = []  # in the outermost termination_raised


def _stop(number: int, frame: object) -> NoReturn:
    _received.append(number)
    raise _error_of(number)


def _error_of(number: int) -> KeyboardInterrupt:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


# The handlers that raise an exception.
_HANDLERS = (signal.default_int_handler, _stop)


@contextlib.contextmanager
def termination_raised() -> Iterator[None]:
    """Raise :class:`Terminated` on SIGTERM in this context, so that temporary files are removed.

    C code can drop such an exception and raise another one, as torch does where it makes a tensor
    of a file's storage. That one becomes ``Terminated``, or ``KeyboardInterrupt`` after Ctrl-C.

    Outside the main thread, or with another handler than the system's, nothing changes.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, _stop)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, _stop)
    _received.clear()
    try:
        yield
    except Exception as error:
        if _received:
            raise _error_of(_received[0]) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_end_process() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end the process in this context where they raise an exception.

    Python runs no handler while C++ code waits, as for the other ranks of a process group.

    Outside the main thread, or with other handlers than those of :func:`termination_raised`,
    nothing changes.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    main = threading.current_thread() is threading.main_thread()
    raising = [n for n in numbers if main and signal.getsignal(n) is _stop]
    for number in raising:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in raising:
            signal.signal(number, _stop)


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
    now = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    held = {number: handler for number, handler in now.items() if handler in _HANDLERS}

    def check() -> None:
        if received:
            raise _error_of(received[0])

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
