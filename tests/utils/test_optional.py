"""Optional packages: the error without them, and packages that are hidden from others."""

import importlib.util
import sys

import pytest

from prfl_fast.utils.optional import MissingExtraError, hidden, need


def test_a_missing_package_names_its_extra():
    with pytest.raises(MissingExtraError, match=r"pip install 'prfl_fast\[video\]'"):
        need("no_such_package", "video")


def test_hidden_packages_look_missing_and_come_back():
    """The standard library's cProfile stands for a package that nothing has imported."""
    sys.modules.pop("cProfile", None)
    with hidden("cProfile", "json"):
        assert importlib.util.find_spec("cProfile") is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("cProfile")
        assert importlib.util.find_spec(".decoder", package="json")
        assert importlib.util.find_spec("json") and importlib.import_module("json")  # as before
    assert importlib.util.find_spec("cProfile") and importlib.import_module("cProfile").run
