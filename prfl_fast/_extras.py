"""Optional packages, imported where they are used; the error names the extra to install."""

import importlib
from types import ModuleType


class MissingExtra(ImportError):
    """An optional package is not installed; the message is the command that installs it."""


def need(module: str, extra: str = "train") -> ModuleType:
    """Import ``module``.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingExtra(
            f"{package} is not installed: pip install 'prfl_fast[{extra}]'"
        ) from error
