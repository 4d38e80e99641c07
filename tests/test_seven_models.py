"""One cell for each row and column of matrix.py's grid of models and methods.

The whole grid is a command of its own.
"""

import pytest
import seven_grid
import seven_models

METHODS = list(seven_grid.METHODS)
# DeepSpeed's two columns are in test_deepspeed.py. Each other method once, on one model after the
# other; and what is refused on purpose.
CELLS = [
    (seven_models.NAMES[i % len(seven_models.NAMES)], method) for i, method in enumerate(METHODS)
]
CELLS += [pair for pair in seven_grid.REFUSED if pair not in CELLS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("seven")


def test_every_row_and_column_is_there():
    assert {model for model, _ in CELLS} == set(seven_models.NAMES)
    assert {method for _, method in CELLS} == set(METHODS)


@pytest.mark.parametrize(("model", "method"), CELLS)
def test_cell(model, method, folder, capsys):
    table = seven_grid.seven(folder / f"{model} {method}", lambda name: name == f"{model} {method}")
    assert table[model][method] == ("refused" if (model, method) in seven_grid.REFUSED else "ok")
