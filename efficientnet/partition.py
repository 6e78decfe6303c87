"""The stages of a recipe as a table, to see where a network would be cut and what each device would do and hold.

  python -m efficientnet.partition --config=configs/cifar10.py --config.stages=2 --classes=10

needs neither data nor devices; stages.py says what is counted. configs/base.py names every field that
--config.FIELD=VALUE can set: model, image_size, micro_batch, stages, splits, pipeline, recompute, precision.policy,
optimizer.name and averaging matter here.
"""

from collections.abc import Sequence

import ml_collections
from absl import app, flags
from ml_collections import config_flags

from efficientnet.errors import leave, one_line, plainly
from efficientnet.loop.settings import check_known
from efficientnet.model.costs import block_costs
from efficientnet.model.scaling import configured_spec
from efficientnet.parallel.stages import PUBLISHED, StageCost, config_options, parse_splits, resolve_splits, stage_table


def format_table(stages: Sequence[StageCost], *, timed: bool = False) -> str:
    """Returns the stages as aligned text, a line each, and one about all of them.

    Args:
        stages: As `stage_table` returns them.
        timed: Whether their work is in seconds.
    """
    most = max(stage.work for stage in stages) or 1
    titles = 'stage,blocks,count,parameters,MACs/image,work/micro-batch,weights,stash,activations,total,sent on,load'
    rows = [tuple(titles.split(','))]
    for number, stage in enumerate(stages):
        row = (
            str(number),
            ' … '.join(dict.fromkeys((stage.blocks[0], stage.blocks[-1]))),
            str(len(stage.blocks)),
            _count(stage.parameters),
            _count(stage.macs),
            f'{1000 * stage.work:,.2f} ms' if timed else _count(stage.work),
            *map(_bytes, (stage.weights, stage.stash, stage.activations, stage.total, stage.sent)),
            f'{stage.work / most:.0%}',
        )
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for number, blocks, *cells in rows:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[2:], strict=True)]
        lines.append('  '.join([number.rjust(widths[0]), blocks.ljust(widths[1]), *cells]))
    load = sum(stage.work for stage in stages) / most / len(stages)
    largest = sum(max(values) for values in zip(*((s.weights, s.stash, s.activations) for s in stages), strict=True))
    needed = f'one program serves all, so every device needs the largest of each: {_bytes(largest)}'
    lines.append(f'mean load {load:.0%}; {needed}')
    return '\n'.join(lines)


def _count(value: float) -> str:
    return _scaled(value, 1000, ('', ' k', ' M', ' G', ' T', ' P'))


def _bytes(value: float) -> str:
    return _scaled(value, 1024, (' B', ' KiB', ' MiB', ' GiB', ' TiB'))


def _scaled(value: float, step: int, units: Sequence[str]) -> str:
    """Three digits and a unit, each unit `step` times the one before."""
    power = 0
    while value >= step and power < len(units) - 1:
        value, power = value / step, power + 1
    decimals = 2 - (value >= 9.995) - (value >= 99.95) if power else 0
    return f'{value:.{decimals}f}{units[power]}'


def report(config: ml_collections.ConfigDict, classes: int = 1000) -> str:
    """Returns what the command prints: the stages of a recipe and, beside those of a B4, the published ones.

    Args:
        config: With the fields of configs/base.py.
        classes: Of the data set.

    Raises:
        ConfigError: A field is out of range or at odds with another.
    """
    from efficientnet.numerics.precision import policy as policy_of

    check_known(config)
    model, policy = config.model, policy_of(config.precision.policy)
    spec = configured_spec(model, classes)
    costs = block_costs(spec, config.image_size, norm=model.norm)
    options = config_options(config, policy, pipelined=True)
    splits = resolve_splits(config.splits, config.stages, spec, costs, **options)
    origin = 'balanced' if parse_splits(config.splits) == 'auto' else 'as given'
    lines = [
        f'{model.variant}, group size {model.group_size}, norm {model.norm}, {config.image_size} pixels, '
        f'{classes:,} classes; micro-batch {config.micro_batch}, {policy.name}, {config.optimizer.name}, '
        f'{config.pipeline} schedule, recompute {config.recompute}',
    ]
    tables = {origin: splits}
    published = PUBLISHED.get(model.variant)
    if published not in (None, splits):
        tables['published by the reference for group size 16'] = published
    for origin, splits in tables.items():
        lines += ['', f'splits={",".join(splits)!r} ({origin})', format_table(stage_table(costs, splits, **options))]
    return '\n'.join(lines)


def main() -> None:
    """Prints the stages of the recipe that the flags name; whatever is wrong with them is one line."""
    config = config_flags.DEFINE_config_file('config', None, 'Recipe, such as configs/cifar10.py.', lock_config=True)
    classes = flags.DEFINE_integer('classes', 1000, 'Classes of the data set.', lower_bound=1)

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
            if config.value is not None:
                config.value.keys()  # a recipe that could not be loaded says so only when it is used
        except Exception as error:  # ml_collections raises AttributeError, TypeError, ValueError, …
            leave(plainly(error))
        if len(rest) > 1:
            leave(f'unexpected argument {rest[1]!r}; flags start with --')
        if config.value is None:
            leave('--config is missing, such as --config=configs/cifar10.py')
        return rest

    def run(_: list[str]) -> None:
        with one_line():
            print(report(config.value, classes.value))

    app.run(run, flags_parser=parse)


if __name__ == '__main__':
    main()
