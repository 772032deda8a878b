"""Leave cases of a test to the slow tier: the default one takes five minutes of two cores."""

import pytest


def slow_except(cases, fast):
    """Return the cases as parameters, marked slow unless in ``fast``."""
    return [c if c in fast else pytest.param(c, marks=pytest.mark.slow) for c in cases]
