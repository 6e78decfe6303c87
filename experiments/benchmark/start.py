"""Where the time goes between a command and its first update.

The command is run for real, in a new folder each time, and stopped after its first update; what it prints tells when
it had got how far. Importing what it imports is timed by itself. The first round fills the cache of compiled programs
if it is empty and does not count, so this is what a second start takes.
"""

import argparse
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from efficientnet.errors import ConfigError, RunError
from experiments.benchmark.setup import progress, table
from experiments.trainer import PROGRAM, ROOT

TARGET = 10.0  # seconds
# What a run prints first when it has come to the end of a phase.
PHASES = {
    'data, checks': 'model ',
    'folder, checkpoints': 'compiling',
    'programs, weights, first update': 'epoch ',
}
IMPORTS = 'imports'


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's flags."""
    parser.add_argument('--config', default='configs/digits.py', help='recipe (%(default)s)')
    parser.add_argument('--rounds', type=int, default=3, help='times that it is started (%(default)s)')
    parser.add_argument('--json', action='store_true', help='print one JSON object instead of text')
    parser.add_argument('flags', nargs='*', help="further flags of main.py, after a '--'")


def run(args: Mapping[str, Any]) -> dict[str, Any]:
    """Starts the run several times and returns the median seconds of each phase.

    Raises:
        ConfigError: A flag is out of range.
        RunError: The run failed.
    """
    if args['rounds'] < 1:
        raise ConfigError(f'--rounds={args["rounds"]} must be at least 1')
    command = [*PROGRAM, f'--config={args["config"]}', '--config.log_every=1 steps', *args['flags']]
    rounds = []
    for number in range(-1, args['rounds']):
        progress('filling the cache …' if number < 0 else f'round {number + 1} of {args["rounds"]} …')
        rounds.append(phases(time_imports(), time_lines(command)))
    seconds = {name: statistics.median(each[name] for each in rounds[1:]) for name in rounds[0]}
    return {'benchmark': 'start', 'flags': dict(args), 'seconds': seconds, 'total': sum(seconds.values())}


def time_imports() -> float:
    """Returns the seconds that a process takes which imports what training imports, and does nothing."""
    began = time.perf_counter()
    subprocess.run([sys.executable, '-c', 'import efficientnet.loop.train, main'], cwd=ROOT, check=True)
    return time.perf_counter() - began


def time_lines(command: Sequence[str]) -> dict[str, float]:
    """Runs a command until it has printed its first progress line.

    Returns:
        Seconds from its start to the first line that begins as each of `PHASES` says.

    Raises:
        RunError: It ended before.
    """
    found: dict[str, float] = {}
    # Errors go to a file: a pipe that nobody reads meanwhile would stop the run once it is full.
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile('w+') as errors:
        workdir = pathlib.Path(folder) / 'run'
        began = time.perf_counter()
        process = subprocess.Popen(
            [*command, f'--workdir={workdir}'], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=errors
        )
        try:
            for line in process.stdout:
                now = time.perf_counter() - began
                for name, start in PHASES.items():
                    if line.startswith(start):
                        found.setdefault(name, now)
                if len(found) == len(PHASES):
                    break
        finally:
            process.kill()
            process.communicate()
        errors.seek(0)
        said = errors.read()
    if len(found) < len(PHASES):
        raise RunError(f'{" ".join(command)} ended before its first update: {" ".join(said.split())[-300:]}')
    return found


def phases(imports: float, lines: Mapping[str, float]) -> dict[str, float]:
    """Returns the seconds of each phase by itself, from when each line came."""
    seconds, before = {IMPORTS: imports}, imports
    for name in PHASES:
        seconds[name] = lines[name] - before
        before = lines[name]
    return seconds


def show(result: Mapping[str, Any]) -> str:
    """Returns a table of the phases."""
    total = result['total']
    rows = [(f'from the command to the first update, {result["flags"]["config"]}', 's', 'of all')]
    rows += [(name, f'{value:.1f}', f'{value / total:.0%}') for name, value in result['seconds'].items()]
    verdict = 'met' if total <= TARGET else 'missed'
    rows.append(('all', f'{total:.1f}', '100%'))
    return f'{table(rows)}\n\ntarget {TARGET:.0f} s, {verdict}'
