"""Version of this installation, as setup.py wrote it."""

try:
    from prfl_fast._version import __version__
except ModuleNotFoundError:  # a checkout that was never installed
    __version__ = "0+checkout"
