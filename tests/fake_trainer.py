"""Stands in for main.py where a test is about who runs it: same flags, same files, no training.

It evaluates four times. A file 'wait' beside its folder keeps it from going on after the first, a momentum of 0.5
after the second. SIGTERM makes it save (a file 'saved') and leave. A large weight decay is an error.
"""

import json
import math
import os
import pathlib
import signal
import sys
import time


def accuracy(flags: dict[str, str]) -> float:
    """A smooth function with its maximum where the momentum is 0.9, lower in small batches."""
    momentum, batch = float(flags.get('optimizer.momentum', 0.9)), float(flags.get('global_batch', 64))
    return 0.9 - abs(momentum - 0.9) - 0.1 / math.sqrt(batch) - 0.001 * int(flags.get('seed', 0))


def main() -> None:
    """Pretends to train."""
    flags = dict(argument.removeprefix('--').split('=', 1) for argument in sys.argv[1:])
    workdir = pathlib.Path(flags.pop('workdir'))
    flags = {name.removeprefix('config.'): value for name, value in flags.items()}
    with (workdir / 'starts').open('a') as file:
        print(os.getpid(), json.dumps(flags), file=file)
    if float(flags.get('optimizer.weight_decay', 0)) > 5e-4:
        print('compiling …')
        print('error: 20 updates in a row were not finite', file=sys.stderr)
        sys.exit(4)
    if flags.get('epochs') == '-3':
        print('error: epochs=-3 is out of range', file=sys.stderr)
        sys.exit(2)
    if 'crash' in flags.get('dataset', ''):
        os.kill(os.getpid(), signal.SIGKILL)

    def leave(*_: object) -> None:
        (workdir / 'saved').touch()
        sys.exit(143)

    signal.signal(signal.SIGTERM, leave)
    (workdir / 'checkpoints').mkdir(exist_ok=True)
    metrics = workdir / 'metrics.csv'
    metrics.write_text('step,test_accuracy,last\n1,,\n')
    for number in range(1, 5):
        with metrics.open('a') as file:
            file.write(f'{number},{accuracy(flags) * number / 4},\n')
        while (workdir.parent / 'wait').exists() or (number == 2 and flags.get('optimizer.momentum') == '0.5'):
            time.sleep(0.01)
    summary = {'test_accuracy': accuracy(flags), 'test_accuracy_averaged': accuracy(flags) + 0.01, 'steps': 4}
    summary |= {'seconds': 2.0, 'images_per_second': 100.0, 'skipped': 0, 'global_batch': 50, 'parameters': 7}
    (workdir / 'summary.json').write_text(json.dumps(summary))


if __name__ == '__main__':
    main()
