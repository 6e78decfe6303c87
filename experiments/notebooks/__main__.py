"""Executes notebooks and stores them with their outputs, so that a code host shows them.

python -m experiments.notebooks
python -m experiments.notebooks claims compare_runs
"""

import argparse
import pathlib
import re
import sys

import nbclient
import nbformat
from traitlets.config import Config

FOLDER = pathlib.Path(__file__).parent


def execute(path: pathlib.Path) -> None:
    """Runs all cells of a notebook in a new kernel, in its folder, and stores it."""
    notebook = nbformat.read(path, as_version=4)
    encrypted = Config({'KernelManager': {'transport_encryption': 'auto'}})  # else kernels warn of other users
    folder = {'metadata': {'path': str(path.parent)}}
    nbclient.NotebookClient(notebook, config=encrypted, timeout=600, resources=folder).execute()
    for cell in notebook.cells:
        cell.metadata.pop('execution', None)  # when each cell ran would be a difference each time
        for output in cell.get('outputs', ()):
            if 'image/png' in output.get('data', {}):
                output.data['text/plain'] = re.sub(r' at 0x[0-9a-f]+', '', output.data['text/plain'])
    notebook.metadata.pop('language_info', None)
    nbformat.write(notebook, path)


def main(argv: list[str]) -> None:
    """Executes the notebooks that are named, or all."""
    known = {path.stem: path for path in sorted(FOLDER.glob('*.ipynb'))}
    parser = argparse.ArgumentParser(prog='python -m experiments.notebooks', description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument('names', nargs='*', metavar='NAME', help=f'among {", ".join(known)}; all if none')
    args = parser.parse_args(argv)
    for name in args.names or known:
        if name not in known:
            parser.error(f'{name!r} is unknown; choose among {", ".join(known)}')
        execute(known[name])
        print(known[name])


if __name__ == '__main__':
    main(sys.argv[1:])
