"""Trains what the reference's claims compare, over several seeds, and prints a table of verdicts.

python -m experiments.claims --scale=digits --workers=2
python -m experiments.claims --config.input.dir=DIR
python -m experiments.claims --scale=gpu --claims=batch,norms
python -m experiments.claims --scale=digits --show

The same command goes on after a kill, run by run; several machines may share a --workdir. --show prints the table of
the runs so far, or of the results that are stored in experiments/claims/results, and trains nothing.
--config.FIELD=VALUE is added to all runs; what was run with others is run again. A run that is killed with its
command goes on by itself, and is taken up when it has ended. While a run is left the status is not 0.

The scales: digits is embedded, and its 110 runs take some 40 minutes; cpu is CIFAR-10, sized for
three hours of two cores; gpu is CIFAR-10 at a larger size, not run yet.
"""

import argparse
import pathlib
import sys

from efficientnet.errors import ConfigError, one_line
from efficientnet.loop.interrupt import Interrupt
from experiments import trainer
from experiments.claims import report, runs, table

STORED = pathlib.Path(__file__).parent / 'results'


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags, and what is added to all runs."""
    parser = argparse.ArgumentParser(
        prog='python -m experiments.claims',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = list(table.claims(table.SCALES['cpu']))
    parser.add_argument('--scale', choices=table.SCALES, default='cpu', help='how large everything is (%(default)s)')
    parser.add_argument('--claims', default=','.join(names), help='which (%(default)s)')
    parser.add_argument('--workers', type=int, help='runs at a time (1)')
    parser.add_argument('--workdir', type=pathlib.Path, default=pathlib.Path('runs/claims'), help='(%(default)s)')
    parser.add_argument(
        '--results', type=pathlib.Path, help='CSV with a row a run, written or, with --show, read (WORKDIR/SCALE.csv)'
    )
    parser.add_argument('--show', action='store_true', help='train nothing')
    args, rest = parser.parse_known_args(argv)
    args.claims = args.claims.split(',')
    for name in args.claims:
        if name not in names:
            raise ConfigError(f'--claims: {name!r} is unknown; choose among {", ".join(names)}')
    rest = trainer.overrides(rest)
    if args.show and args.workers is not None:
        raise ConfigError('--workers means nothing with --show')
    if args.show and args.results and rest:
        raise ConfigError(f'{rest[0]} means nothing with --show and --results, which holds the runs as they were')
    args.workers = 1 if args.workers is None else args.workers
    if args.workers < 1:
        raise ConfigError(f'--workers={args.workers} must be at least 1')
    args.workdir = args.workdir.expanduser().absolute()
    return args, rest


def run(args: argparse.Namespace, more: list[str]) -> None:
    """Trains what is missing, writes the results and prints the table."""
    scale = table.SCALES[args.scale]
    trainer.load_recipe(scale.recipe, more)  # a mistake in a field shows here and not in every run
    every = table.settings(scale)
    planned = runs.plan(scale, every, every, args.workdir / args.scale, more)
    results = args.results or args.workdir / f'{args.scale}.csv'
    names = table.needed(scale, args.claims)
    for field in trainer.overridden(more):
        if field in table.varied(scale, names):
            raise ConfigError(f'--config.{field} cannot be set: the runs of {",".join(args.claims)} differ in it')
    left = 0
    if not args.show:
        trainer.make_folder('workdir', args.workdir)
        trainer.check_file('results', results)
        left = train([one for one in planned if one.name in names], every, args.workers)
    rows = [row for one in planned if (row := runs.read(one, every)) is not None]
    if not args.show:
        runs.write_rows(rows, results)
    elif args.results or not rows:
        results = args.results or STORED / f'{args.scale}.csv'
        if more or not results.exists():
            stored = f'with {" ".join(more)}' if more else f'and no results in {results}'
            raise ConfigError(f'there are no runs in {args.workdir} {stored}')
        rows = runs.read_rows(results, every)
        for row in rows:
            if f'--config={scale.recipe} ' not in row['command']:
                raise ConfigError(f'{results} is not of --scale={args.scale}: {row["command"][:60]} …')
    else:
        results = args.workdir / args.scale
    claims = {name: claim for name, claim in table.claims(scale).items() if name in args.claims}
    print(report.show(claims, runs.collect(rows)))
    print(f'\n{report.legend(scale, names, more)}\n')
    print(f'{len(rows)} runs; {results}')
    stored = STORED / f'{args.scale}.csv'
    if args.show and not args.results and results != stored and stored.exists():
        print(f'the results stored with the project: --show --results={stored.relative_to(trainer.ROOT)}')
    if left:
        sys.exit(left)


def train(planned: list[runs.Run], every: dict[str, table.Setting], workers: int) -> int:
    """Does the runs that are not done; returns the status to leave with: 0 if all are done now, by whomever.

    Raises:
        ConfigError: A run was refused.
    """
    missing = [one for one in planned if runs.read(one, every) is None]
    print(f'{len(planned) - len(missing)} of {len(planned)} runs are done', flush=True)
    with Interrupt() as interrupt:
        runner = runs.Runner(missing, every, stop=interrupt.requested, say=lambda text: print(text, flush=True))
        trainer.in_threads(workers, runner.work)
    left = any(runs.read(one, every) is None for one in missing)
    return 128 + interrupt.number if interrupt.number else int(left)


def main(argv: list[str]) -> None:
    """Tests the claims; whatever is wrong with the flags is one line."""
    with one_line():
        run(*parse(argv))


if __name__ == '__main__':
    main(sys.argv[1:])
