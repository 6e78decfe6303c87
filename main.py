"""Trains, evaluates or uses an EfficientNet.

  python main.py --config=configs/digits.py --workdir=runs/digits
  python main.py --config=configs/cifar10.py --workdir=runs/cifar10 --config.seed=1 --config.replicas=8
  python main.py --config=configs/digits.py --workdir=runs/two --cpu_devices=2 --config.stages=2 --config.micro_batch=8
  python main.py --mode=evaluate --workdir=runs/digits
  python main.py --mode=predict --workdir=runs/digits photo.jpg folder - < list.txt

configs/base.py names every field that --config.FIELD=VALUE can set. The same command again resumes a run.
"""

import gc
import os
import pathlib
import sys
from logging import Formatter

from absl import app, flags, logging
from ml_collections import config_flags

from efficientnet.errors import leave, one_line, plainly

MODES = ('train', 'evaluate', 'predict')

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Recipe, such as configs/digits.py.', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run: checkpoints, metrics, summary.')
_MODE = flags.DEFINE_enum('mode', 'train', MODES, 'What to do; the latter two take their config from the workdir.')
_CSV = flags.DEFINE_bool('csv', False, 'predict: writes a table, a row a guess.')
_JSON = flags.DEFINE_bool('json', False, 'predict: writes a JSON list of {file, top: [{index, name, probability}, …]}.')
_WEIGHTS = flags.DEFINE_enum(
    'weights',
    'raw',
    ('raw', 'averaged', 'update_average'),
    'predict: with the weights themselves, or their average over epochs or over updates.',
)
_CPU_DEVICES = flags.DEFINE_integer(
    'cpu_devices',
    0,
    'Virtual CPU devices of this process, to try replicas and stages without accelerators; 0 = what there is.',
    lower_bound=0,
)
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, if several processes share the run.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Number of this process, from 0.')
_PROCESS_COUNT = flags.DEFINE_integer('process_count', None, 'Processes that share the run.')
_CLUSTER = flags.DEFINE_enum(
    'cluster',
    'auto',
    ('auto', 'jax', 'none'),
    'Who says what --coordinator, --process_id and --process_count leave open: the launcher (srun, mpirun, torchrun, '
    "a Kubernetes Job or JobSet), JAX's own detection (Cloud TPU), or nobody; see docs/launch.md.",
)


def run(argv: list[str]) -> None:
    """Sets JAX up as the flags say and hands over."""
    logging.set_verbosity(logging.WARNING)  # absl's default for programs would pass on every library's chatter
    logging.get_absl_handler().setFormatter(Formatter('%(levelname)s: %(message)s'))  # a time and a thread tell nobody
    gc.set_threshold(50_000)  # importing and tracing make many objects and hardly any garbage: a second of the start
    from efficientnet.loop.host_memory import computes_on_cpu, keep_freed_memory

    if _CPU_DEVICES.value or computes_on_cpu():
        keep_freed_memory()
    import jax

    from efficientnet.loop.program_cache import keep_programs

    if _CPU_DEVICES.value:
        jax.config.update('jax_platforms', 'cpu')
        jax.config.update('jax_num_cpu_devices', _CPU_DEVICES.value)
    keep_programs()

    if _MODE.value == 'predict':
        from efficientnet.predict import predict

        for stream in filter(None, (sys.stdin, sys.stdout)):  # a file's name is bytes, which need not be UTF-8
            stream.reconfigure(encoding='utf-8', errors='surrogateescape')
        form = 'csv' if _CSV.value else 'json' if _JSON.value else 'text'
        sys.exit(bool(predict(pathlib.Path(_WORKDIR.value).expanduser(), argv[1:], form, _WEIGHTS.value, sys.stdout)))

    from efficientnet.loop import settings, train
    from efficientnet.parallel import processes

    given = processes.Membership(_COORDINATOR.value, _PROCESS_ID.value, _PROCESS_COUNT.value)
    with processes.connected(processes.find_membership(given, _CLUSTER.value)):
        workdir = pathlib.Path(_WORKDIR.value).expanduser()
        processes.require_same({'--mode': _MODE.value, **settings.shared(_CONFIG.value)})
        if _MODE.value == 'train':
            train.train(_CONFIG.value, workdir)
        else:
            train.evaluate(_CONFIG.value, workdir)


def parse(argv: list[str]) -> list[str]:
    """Parses the flags; whatever is wrong with them or with the config is one line."""
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is not None:
            _CONFIG.value.keys()  # a recipe that could not be loaded says so only when it is used
    except Exception as error:  # ml_collections raises AttributeError, TypeError, ValueError, … for a bad override
        leave(plainly(error))
    if len(rest) > 1 and _MODE.value != 'predict':
        leave(f'unexpected argument {rest[1]!r}; flags start with --')
    if not _WORKDIR.value:
        leave('--workdir is missing, such as --workdir=runs/digits')
    if _CONFIG.present and _CONFIG.value is None:
        leave('the recipe that --config names must return a ConfigDict, not None')
    if _MODE.value == 'train' and _CONFIG.value is None:
        leave('--config is missing, such as --config=configs/digits.py')
    if _MODE.value == 'predict' and _CONFIG.value is not None:
        leave('--config means nothing to --mode=predict, which takes it from the workdir')
    if _CSV.value and _JSON.value:
        leave('--csv and --json cannot both be had; give one')
    for flag in (_CSV, _JSON, _WEIGHTS):
        if flag.present and _MODE.value != 'predict':
            leave(f'--{flag.name} means nothing to --mode={_MODE.value}, only to --mode=predict')
    return rest


def main() -> None:
    """Runs, and turns mistakes the user can mend into one line."""
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # before jax or tensorflow is imported
    from efficientnet.loop.interrupt import Interrupted

    def guarded(argv: list[str]) -> None:
        with one_line(speaks):
            try:
                run(argv)
            except Interrupted as error:
                from efficientnet.loop.reporting import say

                if speaks(error):
                    say(str(error))
                os._exit(128 + error.number)  # a compilation left behind in a thread would delay a normal exit

    def speaks(error: Exception) -> bool:
        from efficientnet.parallel.processes import first

        return not getattr(error, 'agreed', False) or first()  # what all say is said once

    app.run(guarded, flags_parser=parse)


if __name__ == '__main__':
    main()
