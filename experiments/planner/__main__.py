"""Plans training on a system one may not have: what fits, how long an update takes and what limits it.

python -m experiments.planner --model=b4 --group_size=16 --system=ipu_pod256
python -m experiments.planner --model=b4 --system=dgx_h100_8 --micro_batch=0 --json
python -m experiments.planner --sweep=systems --out=runs/planner
python -m experiments.planner --calibrate
python -m experiments.planner --validate

--system=this_machine plans for the machine that --calibrate has measured. What is assumed, and from where, is in
experiments/planner/README.md.
"""

import argparse
import json
import pathlib
import sys

from efficientnet.errors import ConfigError, one_line
from experiments.benchmark.setup import machine_name
from experiments.planner import report, validation
from experiments.planner import sweep as sweeps
from experiments.planner.calibration import MACHINE_FILE, POINTS, load_machine, plan_on
from experiments.planner.systems import SYSTEMS, THIS_MACHINE
from experiments.planner.workload import Workload

HELP = {
    'model': 'b0 … b7, lite0 … lite4',
    'group_size': 'channels a group in the spatial convolutions',
    'image_size': "pixels a side; 0 = the model's",
    'classes': 'of the data set',
    'global_batch': 'images a weight update',
    'micro_batch': 'images computed at once; 0 = the fastest up to 256 that fits, if few images lost no speed',
    'splits': "first block of each stage but the first, 'balanced', or 'auto': the reference's if any, else balanced",
    'replicas': 'copies of the model; 0 = as many as there are devices for',
    'schedule': "'grouped' or 'sequential'",
    'recompute': "'none', 'block' or 'stage'",
    'policy': 'compute.master numbers',
    'optimizer': "'lars', 'rmsprop' or 'sgd'",
    'epochs': 'passes over the data set',
    'examples': 'in the data set',
    'images': "what crosses the hosts' link: 'uint8' or 'fp32'",
}


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the flags."""
    options = {'formatter_class': argparse.RawDescriptionHelpFormatter, 'allow_abbrev': False}
    parser = argparse.ArgumentParser(prog='python -m experiments.planner', description=__doc__, **options)
    parser.add_argument(
        '--system', default='ipu_pod256', help='such as bow_pod64, dgx_h100_8, tpu_v4_512 (%(default)s)'
    )
    neutral = Workload()
    for name, meaning in HELP.items():
        value = getattr(neutral, name)
        parser.add_argument(f'--{name}', type=type(value), default=value, help=f'{meaning} (%(default)s)')
    parser.add_argument(
        '--stages', default='auto', help="devices of one copy, or 'auto': the fastest that fits (%(default)s)"
    )
    parser.add_argument('--json', action='store_true', help='print one JSON object instead of text')
    parser.add_argument(
        '--machine',
        type=pathlib.Path,
        help=f'what --calibrate writes and this_machine is ({MACHINE_FILE}; for --validate what is stored with it)',
    )
    parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('runs/planner'), help='folder of the charts')
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument('--sweep', choices=['systems'], help='draw throughput and hours by system')
    modes.add_argument('--calibrate', action='store_true', help='measure this machine (two minutes)')
    modes.add_argument('--validate', action='store_true', help='lay predictions beside what was found')
    args = parser.parse_args(argv)
    # Defaults do not replace what is there already, so that what was given stands out.
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), None))))
    mode, read = _mode(args)
    for name, value in given.items():
        if value is not None and name not in read:
            raise ConfigError(f'--{name} means nothing with {mode}')
    return args


def _mode(args: argparse.Namespace) -> tuple[str, set[str]]:
    """Returns what the flags ask for, and the flags that it reads."""
    workload = {*HELP, 'stages'}
    if args.sweep:
        return f'--sweep={args.sweep}', {'sweep', 'json', 'out', *workload}
    for name in ('calibrate', 'validate'):
        if getattr(args, name):
            return f'--{name}', {name, 'json', 'machine'}
    machine = {'machine'} if args.system == THIS_MACHINE else set()
    return f'--system={args.system}', {'system', 'json', *machine, *workload}


def run(args: argparse.Namespace) -> str:
    """Does what the flags ask for and returns what to print.

    Raises:
        ConfigError: A flag is out of range.
        RunError: A measuring process died.
    """
    machine_file = args.machine or MACHINE_FILE
    if args.calibrate:
        from experiments.planner.measure import calibrate

        found = calibrate(machine_file)
        return json.dumps(found) if args.json else f'{report.measured(found)}\n\nwritten to {machine_file}'
    if args.validate:
        measured = validation.machine_rows(args.machine or validation.CALIBRATION)
        rows = [*validation.published_rows(), *validation.memory_rows(), *measured]
        claims = validation.claims()
        if args.json:
            return json.dumps([each._asdict() | {'hit': each.hit} for each in (*rows, *claims)])
        return validation.show(rows, claims)
    workload = Workload(**{name: getattr(args, name) for name in HELP}, stages=_stages(args.stages))
    if args.sweep:
        plans = sweeps.sweep(workload)
        text = sweeps.write(plans, args.out)
        return json.dumps([plan.as_json() for plan in plans]) if args.json else f'{text}\n\ncharts in {args.out}'
    plan = plan_on(args.system, workload, machine_file)
    return json.dumps(plan.as_json()) if args.json else report.show(plan, _calibrated(args.system, machine_file))


def _stages(text: str) -> int:
    if text != 'auto' and not (text.isdecimal() and int(text)):
        raise ConfigError(f"--stages={text!r} must be 'auto' or a whole number above 0")
    return 0 if text == 'auto' else int(text)


def _calibrated(name: str, machine_file: pathlib.Path) -> str:
    if name == THIS_MACHINE:
        machine = load_machine(machine_file)
        other = '' if machine.name == machine_name() else ', which is not this machine'
        return f'one stage, {machine.name}, {machine.date}{other}'
    point = POINTS[SYSTEMS[name].family]
    return f'{point.system}, {point.images_per_second:,.0f} images/s ({point.source})'


def main(argv: list[str]) -> None:
    """Runs the planner; whatever is wrong with its flags is one line."""
    with one_line():
        print(run(parse(argv)))


if __name__ == '__main__':
    main(sys.argv[1:])
