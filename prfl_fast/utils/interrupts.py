"""Hold Ctrl-C back until a place where it can be obeyed."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

_checks: list[Callable[[], None]] = []  # that of the outermost context


@contextlib.contextmanager
def interrupts_held() -> Iterator[Callable[[], None]]:
    """Yield a function that raises ``KeyboardInterrupt`` if Ctrl-C was pressed in this context.

    Python drops a ``KeyboardInterrupt`` that is raised in a callback of a weak reference, and in a
    dispatch of fake tensors it can abort the process. Here SIGINT sets a flag only, which is read
    by the function and at the end of the context. A second Ctrl-C interrupts at once. A nested
    context shares the flag. Outside the main thread, or with another handler than Python's, nothing
    changes.
    """
    pressed: list[int] = []

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    def receive(number: int, frame: object) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    main = threading.current_thread() is threading.main_thread()
    if main and _checks:
        yield _checks[0]
        return
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield check
        return
    signal.signal(signal.SIGINT, receive)
    _checks.append(check)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _checks.remove(check)
        check()  # before any other error, which the interrupt may have caused
