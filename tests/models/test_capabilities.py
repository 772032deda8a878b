"""The table of models in docs/models.md says what its checks find."""

import capabilities
import pytest


def test_the_table_has_the_rows_of_the_checks():
    assert list(capabilities.rows()) == list(capabilities.ROWS)


@pytest.mark.filterwarnings("error:a patched block runs its own forward")
@pytest.mark.cases(1)
@pytest.mark.parametrize("name", capabilities.ROWS)
def test_a_row_says_what_runs(name):
    found = capabilities.cells(name)
    expected = capabilities.rows()[name]
    assert capabilities.row(name, found) == expected, "run python tests/helpers/capabilities.py"
