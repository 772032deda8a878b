"""Write this rank's files of a checkpoint in a thread, while the training goes on."""

import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

Value = TypeVar("Value")


def call(function: Callable[[], Value], background: bool) -> "Future[Value]":
    """Call a function, in a thread if ``background``; return its outcome, exceptions included."""
    outcome: Future[Value] = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # noqa: BLE001 - raised where the outcome is read
            outcome.set_exception(error)

    if background:
        # A daemon: a process that is told to stop at once does not wait for it, and leaves a
        # temporary folder that the next run removes.
        threading.Thread(target=run, name="prfl-fast save", daemon=True).start()
    else:
        run()
    return outcome


class Saving:
    """Hold a checkpoint that is being written, which has no final name yet.

    Attributes:
        step, path: the checkpoint's step and its final path.
        written: outcome of this rank's files.

    Args:
        stages: yields the outcome once, and ends when the folder has its final name.
    """

    def __init__(self, step: int, path: Path, stages: Generator["Future[Any]", None, None]) -> None:
        self.step, self.path, self._stages = step, path, stages
        self.written = next(stages)

    def finish(self) -> Path:
        """Wait for the files of all ranks, which all call it, and give the folder its final name.

        Raises:
            OSError: on every rank, if one of them could not write. The folder is removed then.
        """
        for _ in self._stages:
            raise AssertionError("a checkpoint has two stages")
        return self.path

    def discard(self) -> None:
        """Remove the folder without asking other ranks; a thread that still writes fails."""
        self._stages.close()
