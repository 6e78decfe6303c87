"""Brings trained weights in from elsewhere: makes a folder that --mode=predict and --mode=evaluate take like any run.

  python -m efficientnet.convert model.safetensors runs/b0 --architecture=tf_efficientnet_b0
  python -m efficientnet.convert efficientnet-b0/model.ckpt runs/b0
  python -m efficientnet.convert cars.pth runs/cars --architecture=efficientnet_b2 --classes=cars.txt
  python -m efficientnet.convert runs/digits runs/averaged --weights=averaged

SOURCE is a state dict of timm, torchvision or EfficientNet-PyTorch (.safetensors, .pth), a checkpoint of the original
TensorFlow code, a file that efficientnet.export wrote, or a run. What the tensors don't say (padding, epsilon, scaling
of pixels) is looked up by the architecture's name; what describes the model and its input may be set over it:
--config.evaluation.crop_ratio=0.9.
"""

import json
import operator
import os
import pathlib
from typing import Any

import flax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from configs import base
from efficientnet.errors import ConfigError, leave, one_line, plainly
from efficientnet.loop.files import CHECKPOINTS, CONFIG
from efficientnet.loop.settings import config_of, flatten
from efficientnet.numerics.precision import policy as policy_of
from efficientnet.weights import architectures, naming, state_dicts
from efficientnet.weights.class_names import imagenet
from efficientnet.weights.dataset_facts import DatasetFacts, facts_of_json
from efficientnet.weights.trained import (
    CARD,
    COLUMNS,
    Trained,
    deployed_config,
    read_run,
    variable_shapes,
    write_run,
)

Tree = Any


def convert(
    source: pathlib.Path,
    dest: pathlib.Path,
    *,
    architecture: str = '',
    kind: str = 'auto',
    classes: pathlib.Path | None = None,
    overrides: dict[str, object] | None = None,
) -> Trained:
    """Writes a run with the weights of `source`.

    Args:
        source: A file of weights, a TensorFlow checkpoint or a run.
        dest: Folder to make; must not exist.
        architecture: As timm calls it; '' looks for it in the file's name and in what lies beside it.
        kind: 'raw', 'averaged', 'update_average' (runs only), or 'auto': the average where a foreign file has one.
        classes: File with the class names, one a line; None takes ImageNet's for 1,000 classes.
        overrides: Fields of the config by dotted name.

    Raises:
        ConfigError: Anything does not fit; nothing is written.
    """
    if os.path.exists(dest):  # before the work rather than after it; a Path would raise at a name that is too long
        raise ConfigError(f'{dest} exists; give a folder that does not')
    of_run = (source / CONFIG).is_file() and (source / CHECKPOINTS).is_dir()
    found = None if of_run else state_dicts.read(source, kind)
    if (of_run or CARD in found.metadata) and (architecture or classes):
        raise ConfigError(
            f'{source} says what its architecture and classes are; leave out --architecture and --classes'
        )
    overrides = overrides or {}
    if of_run:
        trained = read_run(source, 'raw' if kind == 'auto' else kind, field='SOURCE')
        trained.config.update_from_flattened_dict(overrides)
    elif CARD in found.metadata:
        trained = _from_card(found, source, kind, overrides)
    else:
        try:
            trained = _from_foreign(found, source, architecture, classes, overrides)
        except ConfigError as error:
            raise (error if str(source) in str(error) else ConfigError(f'{source}: {error}')) from error
    kept = flatten(deployed_config(trained.config, 1))
    dropped = [field for field, value in flatten(trained.config).items() if field in overrides and kept[field] != value]
    if dropped:
        raise ConfigError(
            f'--config.{dropped[0]}={overrides[dropped[0]]!r} is of training, of which converted weights say nothing; '
            'set what describes the model and its input: model.*, input.*, image_size, augment.mean, …'
        )
    trained = _in_own_format(trained, free='precision.policy' not in overrides)
    _check_numbers(trained, source)
    write_run(dest, trained)
    return trained


def _in_own_format(trained: Trained, *, free: bool) -> Trained:
    """Averages are fp32 where the run's weights have 16 bits; what is made of them keeps theirs.

    Args:
        trained: What is to become a run.
        free: Whether nobody has said which policy it shall have; weights that are rounded lose their accuracy.
    """
    policy = policy_of(trained.config.precision.policy)
    formats = {leaf.dtype for leaf in flax.traverse_util.flatten_dict(trained.variables['params']).values()}
    if formats != {np.dtype('float32')} or policy.master == np.float32:
        return trained
    if not free:
        return trained._replace(evaluation={})
    config = trained.config.copy_and_resolve_references()
    config.precision.policy = f'{policy.name.partition(".")[0]}.32'
    return trained._replace(config=config)


def _check_numbers(trained: Trained, source: pathlib.Path) -> None:
    """Raises ConfigError, naming the first, if weights are no finite floats, or not in the run's master format."""
    formats = {
        'params': np.dtype(policy_of(trained.config.precision.policy).master),
        'batch_stats': np.dtype('float32'),
    }
    for name, leaf in flax.traverse_util.flatten_dict(trained.variables, sep='.').items():
        kind = formats[name.split('.')[0]]
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ConfigError(f'{source}: {name} is {leaf.dtype}, not a float format')
        with np.errstate(over='ignore', invalid='ignore'):  # found below
            stored = leaf.astype(kind).astype(np.float32)
        if not np.isfinite(stored).all():
            raise ConfigError(f'{source}: {name} has numbers that are not finite in {kind}, in which it is stored')
        if name.endswith('.var') and (stored < 0).any():
            raise ConfigError(f'{source}: {name} has variances below 0')


def _from_card(found: state_dicts.StateDict, source: pathlib.Path, kind: str, overrides: dict[str, object]) -> Trained:
    """A file that we exported says everything about itself."""
    try:
        card = json.loads(found.metadata[CARD])
        dataset = facts_of_json(card['dataset'])
        fields = flatten(card['config'])
        step = operator.index(card['step'])
        accuracy = {name: float(value) for name, value in card['accuracy'].items()}
        if not 0 <= step < 2**31 or card['weights'] not in COLUMNS:
            raise ValueError(f'step {step}, weights {card["weights"]!r}')
        trained = Trained(base.get_config(), dataset, {}, card['weights'], step, accuracy)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f'{source}: its model card is damaged ({error!r}); export it again') from error
    if kind not in ('auto', trained.kind):
        raise ConfigError(f'{source} has no weights {kind!r}, only {trained.kind!r}')
    trained = trained._replace(config=config_of(fields | overrides, f'the model card of {source}'))
    return trained._replace(variables=_to_ours(source, found, trained, 'timm'))


def _from_foreign(
    found: state_dicts.StateDict,
    source: pathlib.Path,
    architecture: str,
    classes: pathlib.Path | None,
    overrides: dict[str, object],
) -> Trained:
    scheme, prefix = naming.detect(found.arrays)
    beside = state_dicts.timm_config(source) if scheme == 'timm' else {}
    told = (
        architecture or beside.get('architecture') or architectures.find_name(prefix, source.stem, source.parent.name)
    )
    if not told:
        raise ConfigError(
            f'{source} does not say which architecture it is, which decides padding, epsilon and more; '
            'say it: --architecture=tf_efficientnet_b0'
        )
    fields = architectures.fields_of(scheme, told)
    fields |= architectures.fields_of_timm_config(beside.get('pretrained_cfg') or {}) | overrides
    dataset = DatasetFacts(_class_names(found, scheme, prefix, classes), None)
    trained = Trained(_config(fields), dataset, {}, found.kind, 0, {})
    suffix = naming.AVERAGE if scheme == 'tensorflow' and found.kind == 'averaged' else ''
    return trained._replace(variables=_to_ours(source, found, trained, scheme, prefix, suffix))


def _to_ours(source: pathlib.Path, found: state_dicts.StateDict, trained: Trained, *names: str) -> Tree:
    try:
        return naming.to_ours(found.arrays, variable_shapes(trained), *names)
    except ConfigError as error:
        raise ConfigError(f'{source}: {error}') from error


def _class_names(found: state_dicts.StateDict, scheme: str, prefix: str, path: pathlib.Path | None) -> tuple[str, ...]:
    bias = naming.entries(['params.head.classifier.bias'], scheme, prefix)['params.head.classifier.bias'].name
    if bias not in found.arrays:
        raise ConfigError(f'there is no {bias}: weights without a classifier cannot be converted')
    shape = found.arrays[bias].shape
    if len(shape) != 1:
        raise ConfigError(f'{bias} is {shape}, must have one number a class')
    (count,) = shape
    if path is None and count == len(imagenet()):
        return tuple(imagenet())
    if path is None:
        raise ConfigError(f'the classifier has {count} classes; name them: --classes=FILE with one name a line')
    try:
        names = tuple(path.read_text().splitlines())
    except (OSError, ValueError) as error:
        raise ConfigError(f'--classes={path} cannot be read: {error}') from error
    if len(names) != count:
        raise ConfigError(f'--classes={path} has {len(names)} lines, the classifier has {count} classes')
    if not all(map(str.strip, names)):
        number = next(number for number, name in enumerate(names, 1) if not name.strip())
        raise ConfigError(f'--classes={path}: line {number} is empty, must be the name of a class')
    return names


def _config(fields: dict[str, object]) -> ml_collections.ConfigDict:
    config = base.get_config()
    config.dataset, config.input.test_split = 'imagenet2012', 'validation'
    config.precision.policy = '32.32'
    config.update_from_flattened_dict(fields)
    return config


def main() -> None:
    """Converts; whatever is wrong is one line."""
    name = flags.DEFINE_string(
        'architecture', '', "As timm calls it, such as tf_efficientnet_b0; '' = as the file says."
    )
    kinds = ('auto', 'raw', 'averaged', 'update_average')
    kind = flags.DEFINE_enum('weights', 'auto', kinds, 'Which; auto = the average where a foreign file has one.')
    classes = flags.DEFINE_string('classes', None, "File with a class name a line; needed unless they are ImageNet's.")

    try:  # which looks up the fields on the command line at once
        config = config_flags.DEFINE_config_dict('config', base.get_config(), 'Fields to set in the run that is made.')
    except (AttributeError, KeyError) as error:
        leave(plainly(error))

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
        except Exception as error:  # ml_collections raises AttributeError, TypeError, ValueError, …
            leave(plainly(error))
        if len(rest) != 3:
            leave('give SOURCE and DEST, such as: python -m efficientnet.convert model.safetensors runs/b0')
        return rest

    def run(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        source, dest = (pathlib.Path(argument).expanduser() for argument in argv[1:])
        given = flatten(config.value)
        chosen = {field: given[field] for field in config_flags.get_override_values(flags.FLAGS['config'])}
        with one_line():
            trained = convert(
                source,
                dest,
                architecture=name.value,
                kind=kind.value,
                classes=pathlib.Path(classes.value).expanduser() if classes.value else None,
                overrides=chosen,
            )
            c = trained.config
            print(
                f'{dest}: {c.model.variant}, group size {c.model.group_size}, norm {c.model.norm}, padding '
                f'{c.model.padding}, epsilon {c.model.norm_epsilon:g}, {len(trained.dataset.classes):,} classes, '
                f'{c.image_size} pixels, weights {trained.kind}'
            )

    app.run(run, flags_parser=parse)


if __name__ == '__main__':
    main()
