"""The rule for numerics itself: luck of a few elements passes, a larger error does not."""

import pytest
import torch
from op_checks import check, run


def shifted(by):
    """Return a function whose error is up to an ulp of ``by``."""
    return lambda x: (x + by) - by


def test_a_lucky_result_of_plain_pytorch_is_no_measure():
    """Of a whole number the plain result is exact, that under test is not."""
    number = {"x": torch.ones(1)}
    assert shifted(1023.0)(**number) == 1 != shifted(1023.3)(**number)
    check(shifted(1023.3), shifted(1023.0), number)
    with pytest.raises(AssertionError, match="output 0: max error .* > 2 ×"):
        check(shifted(4095.3), shifted(1023.0), number)


def test_an_error_of_one_input_alone_is_found():
    wrong = lambda x: shifted(1023.0)(x) + 0.01 * (x == 1)  # noqa: E731
    with pytest.raises(AssertionError, match="output 0: max error"):
        check(wrong, shifted(1023.0), {"x": torch.ones(1)})


@pytest.mark.parametrize("double", [False, True])
def test_a_run_keeps_strides(double):
    """A clone of rows with gaps has none."""
    x = torch.randn(2, 3, 12).transpose(0, 1)[..., 4:8]
    found = []
    (out,), _ = run(lambda x: found.append(x) or x * 1, {"x": x}, double=double)
    assert found[0].stride() == x.stride() and torch.equal(out.float(), x)
