"""Ctrl-C where Python or torch would lose it."""

import os
import signal
import threading
import weakref

import pytest
import torch

from prfl_fast.utils.interrupts import Terminated, interrupts_held, termination_raised


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


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_termination_is_raised_in_its_context_only():
    with pytest.raises(Terminated), termination_raised():
        terminate()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(("stop", "raised"), [(press, KeyboardInterrupt), (terminate, Terminated)])
def test_an_error_in_place_of_the_interrupt_is_the_interrupt(stop, raised):
    class Storage:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            stop()

    with pytest.raises(raised) as caught, termination_raised():
        torch.tensor(Storage())
    assert type(caught.value) is raised and isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(ValueError, match="another"), termination_raised():
        raise ValueError("another")


def test_termination_is_held_as_an_interrupt_is():
    reached = []
    with pytest.raises(Terminated), termination_raised(), interrupts_held() as check:
        terminate()
        reached.append(1)
        check()
    assert reached == [1]
    with termination_raised(), pytest.raises(Terminated):  # the handler is back
        terminate()


def test_other_handlers_and_threads_are_left_alone():
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with termination_raised(), interrupts_held():
            terminate()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]
    entered = []

    def work():
        with termination_raised():
            entered.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [signal.SIG_DFL]
