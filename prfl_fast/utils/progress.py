"""Show progress: a tqdm bar on a terminal, a line from time to time elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prfl_fast.utils.optional import need

# Seconds between two lines in a file: rare enough for a run of days, often enough to see a stall.
SECONDS = 30.0


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class StepLines:
    """Print steps, metrics and the remaining time: first, last, and every 30 seconds."""

    def __init__(self, name: str, step: int, steps: int) -> None:
        self.name, self.first, self.step, self.steps = name, step, step, steps
        self.text = ""
        self.start = self.printed = time.monotonic()

    def set_postfix(self, values: Mapping[str, object], **_: object) -> None:
        """Keep the metrics for the next line."""
        self.text = "".join(f", {name} {value}" for name, value in values.items())

    def update(self) -> None:
        """Count a step, and print a line if one is due."""
        self.step += 1
        now, taken = time.monotonic(), self.step - self.first
        if now - self.printed < SECONDS and taken > 1 and self.step < self.steps:
            return
        self.printed = now
        left = _clock((now - self.start) / taken * (self.steps - self.step))
        line = f"{self.name}: step {self.step} of {self.steps}{self.text}, {left} left"
        print(line, flush=True)  # to stdout: stderr has errors only


def on_terminal() -> bool:
    """Return True if stderr is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


@contextlib.contextmanager
def step_progress(name: str, step: int, steps: int) -> Iterator[Any]:
    """Yield a bar of ``steps`` steps that starts at ``step``, or lines on stdout."""
    if not on_terminal():
        yield StepLines(name, step, steps)
        return
    # The rate and a short bar leave room for the metrics on 80 columns.
    form = "{desc}: {n_fmt}/{total_fmt} |{bar:8}| {remaining}{postfix}"
    options: dict[str, Any] = {"dynamic_ncols": True, "bar_format": form}
    bar = need("tqdm").tqdm(initial=step, total=steps, desc=name, **options)
    try:
        yield bar
    finally:
        with contextlib.suppress(OSError):
            bar.close()


@contextlib.contextmanager
def count_progress(
    name: str,
    unit: str,
    total: int | None = None,
    *,
    done_word: str = "done",
    at_most: bool = False,
) -> Iterator[Callable[[str], object]]:
    """Yield a function to call before each ``unit`` with a text to show, which counts the units.

    It shows a bar on a terminal; elsewhere a line on stderr every 30 seconds, which says that a
    number of ``unit`` are ``done_word``, and the remaining time if there is a ``total``. With
    ``at_most`` the total is an upper limit.
    """
    if on_terminal():
        options: Any = {"desc": name, "unit": f" {unit}", "total": total, "leave": False}
        with need("tqdm").tqdm(**options, delay=1) as bar:  # none for work of less than a second

            def show(text: str) -> None:
                bar.set_postfix_str(text, refresh=False)
                bar.update()

            yield show
        return
    done, start = 0, time.monotonic()
    printed, limit = start, "at most " if at_most else ""
    of = "" if total is None else f" of {limit}{total}"

    def tell(text: str) -> None:
        nonlocal done, printed
        if time.monotonic() - printed >= SECONDS:
            printed = time.monotonic()
            now = f", now {text}" if text else ""
            if total is not None and done:
                now += f", {limit}{_clock((printed - start) / done * (total - done))} left"
            print(f"{name}: {done}{of} {unit} {done_word}{now}", file=sys.stderr, flush=True)
        done += 1

    yield tell
