"""Import optional packages at their first use, with an error that names the extra to install."""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType


class MissingExtraError(ImportError):
    """Error that names a missing optional package and the command that installs it."""


def need(module: str, extra: str = "train") -> ModuleType:
    """Import ``module`` of the extra ``prfl_fast[extra]``, or raise :class:`MissingExtraError`."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        # An installed package whose own import fails must show its own error.
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingExtraError(
            f"{package} is not installed: pip install 'prfl_fast[{extra}]'"
        ) from error


@contextlib.contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Let installed packages look missing to other packages that import them if they are there.

    Use it in programs only: what others find missing, they do not look for again.
    """
    found, hide = importlib.util.find_spec, [name for name in packages if name not in sys.modules]
    importlib.util.find_spec = (  # type: ignore[assignment]
        lambda name, *rest, **named: None if name in hide else found(name, *rest, **named)
    )
    sys.modules.update(dict.fromkeys(hide))  # type: ignore[arg-type]
    try:
        yield
    finally:
        importlib.util.find_spec = found
        for name in hide:
            del sys.modules[name]


@contextlib.contextmanager
def progress_bar(name: str, unit: str, total: int | None) -> Iterator[Callable[..., object]]:
    """Show a tqdm bar, none if ``total`` is None; yield the function that advances it."""
    if total is None:
        yield lambda count=1: None
        return
    with need("tqdm").tqdm(total=total, desc=name, unit=unit) as bar:
        yield bar.update
