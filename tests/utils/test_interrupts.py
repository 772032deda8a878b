"""Ctrl-C where Python or torch would lose it."""

import os
import signal
import weakref

import pytest

from prfl_fast.utils.interrupts import interrupts_held


class Thing:
    pass


@pytest.fixture(autouse=True)
def _handler():
    """Set Python's handler: a shell starts background processes with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press(*_):
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_in_a_callback_is_not_lost():
    reached = []
    with pytest.raises(KeyboardInterrupt), interrupts_held() as check:
        thing = Thing()
        ref = weakref.ref(thing, press)
        del thing
        reached.append(ref)
        check()
        reached.append("too far")
    assert len(reached) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_end_of_the_context_checks_too():
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        press()
        with interrupts_held() as check:  # shares the flag
            with pytest.raises(KeyboardInterrupt):
                check()
        raise ValueError("caused by the interrupt")


def test_a_second_interrupt_is_at_once():
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        press()
        with pytest.raises(KeyboardInterrupt):
            press()
