"""Leave cases of a test to the slow tier, so that the default one stays short."""

import pytest


def slow_except(cases, fast):
    """Return the cases as parameters, marked slow unless in ``fast``."""
    return [c if c in fast else pytest.param(c, marks=pytest.mark.slow) for c in cases]
