"""The benchmarks' command line, without a process and with one."""

import subprocess
import sys

from experiments.benchmark import __main__ as command

TINY = ('--model=b0', '--width=0.25', '--depth=0.1', '--image_size=32', '--micro_batch=2', '--accumulation=2')


def parsed(*argv):
    args = vars(command.parse(list(argv)))
    del args['benchmark'], args['json']
    return args


def run(*argv):
    done = subprocess.run(
        [sys.executable, '-m', 'experiments.benchmark', *argv], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
