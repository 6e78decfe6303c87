"""Reading a config: unknown fields, fields nothing reads, and what differs from an earlier run.

The rest of the code sees a config through `Fields`, which remembers what was read. When everything has been
built and nothing has been computed, a field that was changed but never read is an error: it would have been
silently ignored.
"""

import dataclasses
from typing import Any

import ml_collections

from configs import base
from efficientnet.errors import ConfigError

# These may change when a run is resumed: they say where and how it runs, not what it computes. (Except that
# images are mixed within a micro-batch, and batch norm takes its statistics there.)
RESUMABLE = (
    'micro_batch',
    'replicas',
    'stages',
    'splits',
    'pipeline',
    'recompute',
    'log_every',
    'input.dir',
    'input.test_dir',
    'input.prefetch',
    'input.cache',
    'input.damaged_limit',
    'checkpoint.every',
    'checkpoint.keep',
    'evaluation.every',
    'evaluation.batch',
    'precision.max_skipped',
    'model.conv_method',
)

OF_A_HOST = ('input.dir', 'input.test_dir', 'input.prefetch', 'input.cache')  # may differ from process to process


def flatten(config: ml_collections.ConfigDict | dict, prefix: str = '') -> dict[str, Any]:
    """Returns {'optimizer.momentum': 0.885, …} of a nested config; sequences become lists, as JSON has them."""
    flat = {}
    for name, value in config.items():
        if hasattr(value, 'items'):
            flat |= flatten(value, f'{prefix}{name}.')
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple | list) else value
    return flat


def config_of(fields: dict[str, Any], where: str) -> ml_collections.ConfigDict:
    """Returns the config with the flat fields of a run; what an older run lacks is as in configs/base.py.

    Args:
        fields: Of the run.
        where: They were found, for a message.

    Raises:
        ConfigError: A field is unknown or of another type.
    """
    config = base.get_config()
    unknown = sorted(fields.keys() - flatten(config).keys())
    if unknown:
        raise ConfigError(f'{where} has fields that are not in configs/base.py: {", ".join(unknown)}')
    try:
        config.update_from_flattened_dict(fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'{where} has a field of another type than configs/base.py: {error}') from error
    empty = [name for name, value in flatten(config).items() if value is None]
    if empty:
        raise ConfigError(f'{where} has null for {", ".join(empty)}; restore what was there')
    return config


def for_evaluation(config: ml_collections.ConfigDict, replicas: int) -> ml_collections.ConfigDict:
    """Returns the config of a run, in whatever layout it was trained, as it is evaluated on so many devices."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.micro_batch, config.replicas = 1, replicas
        config.stages, config.splits, config.pipeline = 1, 'auto', 'grouped'
        config.augment.mixup_alpha = config.augment.cutmix_probability = 0.0  # nothing is mixed with micro_batch=1
    return config


@dataclasses.dataclass(frozen=True)
class Fields:
    """A read-only view of a config that remembers the dotted names of the fields that were read."""

    _config: ml_collections.ConfigDict
    _prefix: str = ''
    _read: set[str] = dataclasses.field(default_factory=set)

    def __getattr__(self, name: str) -> Any:
        value = self._config[name]
        if isinstance(value, ml_collections.ConfigDict):
            return Fields(value, f'{self._prefix}{name}.', self._read)
        self._read.add(self._prefix + name)
        return value

    def unread(self) -> set[str]:
        """Returns the fields of this view and those below it that were never read."""
        return set(flatten(self._config, self._prefix)) - self._read


def shared(config: ml_collections.ConfigDict | None) -> dict[str, Any]:
    """Returns the flat fields of a config that all processes of a run must agree on."""
    fields = {} if config is None else flatten(config)
    return {name: value for name, value in fields.items() if name not in OF_A_HOST}


def check_known(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError unless the config has exactly the fields of configs/base.py."""
    known, given = set(flatten(base.get_config())), set(flatten(config))
    if given - known:
        raise ConfigError(f'unknown config fields: {", ".join(sorted(given - known))}; configs/base.py names all')
    if known - given:
        raise ConfigError(f'config fields missing: {", ".join(sorted(known - given))}; start from configs/base.py')


def check_used(fields: Fields) -> None:
    """Raises ConfigError if a field differs from its neutral value in configs/base.py but nothing read it."""
    neutral, given = flatten(base.get_config()), flatten(fields._config)
    idle = sorted(name for name in fields.unread() if given[name] != neutral[name])
    if idle:
        changes = ', '.join(f'{name}={given[name]!r}' for name in idle)
        hint = ''
        if 'input.dir' in idle:
            hint = f"; dataset={given['dataset']!r} needs no folder, your own images need dataset='folder'"
        raise ConfigError(f'nothing reads these fields under the other settings: {changes}; leave them out{hint}')


def check_resumable(
    stored: dict[str, Any], config: dict[str, Any], workdir: str, idle: frozenset[str] = frozenset()
) -> None:
    """Raises ConfigError if the run in `workdir` was made with other settings than may change, see `RESUMABLE`.

    Args:
        stored: The flat config that the run was started with.
        config: The flat config of the run that would go on.
        workdir: Named in the message.
        idle: Fields that nothing reads now, and that may therefore differ.
    """
    free = set(RESUMABLE) | idle
    if config.get('augment.mixup_alpha') or config.get('augment.cutmix_probability') or config['model.norm'] == 'batch':
        free -= {'micro_batch'}
    if config.get('model.batch_norm_sync'):
        free -= {'replicas'}
    stored = flatten(base.get_config()) | stored  # what an older run lacks
    names = sorted((stored.keys() | config.keys()) - free)
    absent = object()
    changed = [name for name in names if stored.get(name, absent) != config.get(name, absent)]
    if changed:
        changes = ', '.join(f'{name}: {stored.get(name)!r} there, {config.get(name)!r} now' for name in changed)
        raise ConfigError(f'{workdir} holds a run with another config ({changes}); give another --workdir')
