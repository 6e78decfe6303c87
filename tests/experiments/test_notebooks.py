"""Notebooks run from top to bottom, and what they hold is what they print now.

Their cells are executed here, without a kernel, which would take as long to start as most notebooks to run.
"""

import contextlib
import io
import json
import pathlib
import re
import sys

import matplotlib
import nbformat
import pytest
from matplotlib import pyplot

FOLDER = pathlib.Path(__file__).parents[2] / 'experiments' / 'notebooks'
NOTEBOOKS = sorted(FOLDER.glob('*.ipynb'))
LARGEST = 300_000  # bytes


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == 'code']


def printed(cell):
    return ''.join(output.text for output in cell.outputs if output.output_type == 'stream')


def pictures(cell):
    return sum('image/png' in output.get('data', {}) for output in cell.outputs)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_what_it_prints_now(path, monkeypatch):
    matplotlib.use('agg')
    shown = []

    def show():
        for number in pyplot.get_fignums():
            pyplot.figure(number).savefig(io.BytesIO(), format='png')  # a picture that cannot be drawn fails here
            shown.append(number)
        pyplot.close('all')

    monkeypatch.setattr(pyplot, 'show', show)
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    namespace = {'__name__': '__main__'}
    for number, cell in enumerate(code_cells(path)):
        shown.clear()
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(cell.source, f'{path.name}, cell {number}', 'exec'), namespace)
        assert out.getvalue() == printed(cell), f'python -m experiments.notebooks {path.stem} would store another text'
        assert len(shown) == pictures(cell)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_executed_and_small(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output.output_type != 'error' for cell in cells for output in cell.outputs)
    assert any(map(pictures, cells))
    assert path.stat().st_size < LARGEST
    text = json.dumps([cell.source + printed(cell) for cell in cells])
    assert not re.search(r'/(home|root|work|tmp|Users)/', text)  # of the machine that it was executed on
