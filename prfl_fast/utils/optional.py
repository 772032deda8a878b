"""Import optional packages at their first use, with an error that names the extra to install."""

import contextlib
import importlib
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
def progress_bar(name: str, unit: str, total: int | None) -> Iterator[Callable[..., object]]:
    """Show a tqdm bar, none if ``total`` is None; yield the function that advances it."""
    if total is None:
        yield lambda count=1: None
        return
    with need("tqdm").tqdm(total=total, desc=name, unit=unit) as bar:
        yield bar.update
