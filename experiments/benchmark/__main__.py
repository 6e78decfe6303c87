"""Runs a benchmark and prints what it found, as text or as JSON.

python -m experiments.benchmark train_step --model=b0 --group_size=1 --norm=batch --image_size=224 --against=timm
python -m experiments.benchmark pipeline --rounds=10
python -m experiments.benchmark input --photos=DIR
python -m experiments.benchmark memory --model=b0 --image_size=128 --json
python -m experiments.benchmark growth --plot=growth.png
python -m experiments.benchmark start --config=configs/digits.py
"""

import argparse
import json
import sys

from efficientnet.errors import one_line
from experiments.benchmark import growth, host_input, memory, pipeline, start, train_step

BENCHMARKS = {
    'train_step': train_step,
    'growth': growth,
    'pipeline': pipeline,
    'memory': memory,
    'input': host_input,
    'start': start,
}


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the flags; the first line of a benchmark's docstring is its help."""
    parser = argparse.ArgumentParser(prog='python -m experiments.benchmark', description='Benchmarks.')
    names = parser.add_subparsers(dest='benchmark', metavar='NAME', required=True)
    for name, module in BENCHMARKS.items():
        summary = module.__doc__.partition('\n')[0]
        options = {'help': summary, 'description': module.__doc__, 'allow_abbrev': False}
        own = names.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        module.add_flags(own)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Runs the benchmark that is named; whatever is wrong with its flags is one line."""
    args = vars(parse(argv))
    module, as_json = BENCHMARKS[args.pop('benchmark')], args.pop('json')
    with one_line():
        result = module.run(args)
        print(json.dumps(result) if as_json else module.show(result))


if __name__ == '__main__':
    main(sys.argv[1:])
