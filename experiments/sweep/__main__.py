"""Searches the fields of a recipe for the best test accuracy, and writes trials.csv and pictures.

python -m experiments.sweep --study=lars --config=configs/digits.py --trials=20 --workers=2
python -m experiments.sweep --study=lars --config=configs/cifar10.py --config.epochs=3 --trials=50 --storage=sweep.db
python -m experiments.sweep --study=rmsprop --config=configs/digits.py --grid

The same command again goes on after a kill. Started on several machines with one --storage, an SQL URL or a file
they share (FILE.db is SQLite; any other file is a journal, which may lie on NFS), they work on the same study.
--config.FIELD=VALUE changes the recipe of all trials. A machine with several accelerators takes one command for each,
told apart by CUDA_VISIBLE_DEVICES or the like. Ctrl-C and SIGTERM have the runs save and leave; a sweep that is killed
outright leaves them going, and the next one takes them over when they end.
"""

import argparse
import collections
import pathlib
import shlex
import sys
from collections.abc import Sequence

import optuna

from efficientnet.errors import ConfigError, one_line
from efficientnet.loop.interrupt import Interrupt
from experiments import trainer
from experiments.sweep import report, search, studies


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags, and the fields of the recipe that are set on the command line."""
    parser = argparse.ArgumentParser(
        prog='python -m experiments.sweep',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument('--study', required=True, choices=studies.STUDIES, help='what is searched')
    parser.add_argument('--config', required=True, help='recipe, such as configs/cifar10.py')
    many = parser.add_mutually_exclusive_group(required=True)
    many.add_argument('--trials', type=int, help='at most so many, those before a restart counted')
    many.add_argument('--grid', action='store_true', help='all combinations of the values that the study names')
    parser.add_argument('--workers', type=int, default=1, help='runs at a time (%(default)s)')
    parser.add_argument('--storage', help='URL or file of the trials (sweep.db in --workdir)')
    parser.add_argument('--name', help='of the study in the storage (STUDY-RECIPE)')
    parser.add_argument('--workdir', type=pathlib.Path, help='for runs, trials.csv and pictures (runs/NAME)')
    parser.add_argument('--prune', action=argparse.BooleanOptionalAction, default=True, help='end bad trials early')
    args, rest = parser.parse_known_args(argv)
    rest = trainer.overrides(rest)
    for name in ('trials', 'workers'):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f'--{name}={value} must be at least 1')
    recipe = pathlib.Path(args.config).name.replace('.py', '').replace(':', '-')  # with its argument
    args.name = args.name or f'{args.study}-{recipe}'
    args.workdir = (args.workdir or pathlib.Path('runs') / args.name).expanduser().absolute()
    args.storage = args.storage or str(args.workdir / 'sweep.db')
    return args, rest


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    """Runs what is left of a sweep and writes what came of it."""
    plan = studies.STUDIES[args.study]
    recipe = trainer.load_recipe(args.config, overrides)
    for field in sorted(studies.own_fields(plan) & set(trainer.overridden(overrides))):
        raise ConfigError(f'--config.{field} means nothing here: study {args.study} sets it in every trial')
    space = studies.distributions(plan, recipe)
    trainer.make_folder('workdir', args.workdir)
    search.claim_folder(args.workdir, args.name)
    study = search.open_study(args.name, search.open_storage(args.storage), recipe, prune=args.prune)
    with Interrupt() as interrupt:
        sweep = search.Sweep(
            study=study,
            plan=plan,
            recipe=args.config,
            overrides=overrides,
            space=space,
            runs=args.workdir / 'trials',
            trials=args.trials or 0,
            stop=interrupt.requested,
            say=lambda text: print(text, flush=True),
        )
        count = sweep.enqueue_grid(studies.grid(plan, recipe)) if args.grid else args.trials
        print(f'study {args.name}: {count} trials, {args.workers} at a time, in {args.workdir}')
        print(f'  fixed: {", ".join(f"{name} {value}" for name, value in plan.changes.items())}')
        for name in space:
            print(f'  {name}: {studies.describe(plan, name, recipe, grid=args.grid)}', flush=True)
        try:
            trainer.in_threads(args.workers, sweep.work)
        finally:
            files = report.write(study, args.workdir)
    for file in files:
        print(file)
    print(summary(study, plan, overrides))
    if interrupt.requested():
        sys.exit(128 + interrupt.number)
    states = {trial.state for trial in study.get_trials(deepcopy=False)}
    if optuna.trial.TrialState.FAIL in states and optuna.trial.TrialState.COMPLETE not in states:
        sys.exit(1)


def summary(study: optuna.Study, plan: studies.Study, overrides: Sequence[str] = ()) -> str:
    """Returns how many trials ended how, and the best with what to add to the recipe's command.

    Args:
        study: With its trials.
        plan: Whose trials they are.
        overrides: Fields of the recipe that were set on the command line; later ones win, so they come first.
    """
    trials = study.get_trials(deepcopy=False)
    ended = zip(trials, report.states(trials), strict=True)
    counts = collections.Counter(state for trial, state in ended if search.FOLDER in trial.user_attrs)
    lines = [', '.join(f'{count} {state}' for state, count in counts.items())]
    done = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
    if done:
        best = max(done, key=lambda trial: trial.value)
        lines.append(f'best: {best.value:.2%} by trial {best.number}')
        changes = [trainer.override(*item) for item in studies.changes(plan, best.params).items()]
        lines += [f'  {shlex.quote(argument)}' for argument in (*overrides, *changes)]
    return '\n'.join(lines)


def main(argv: list[str]) -> None:
    """Sweeps; whatever is wrong with the flags or the recipe is one line."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with one_line():
        run(*parse(argv))


if __name__ == '__main__':
    main(sys.argv[1:])
