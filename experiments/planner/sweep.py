"""The same run on one system after the other: the reference's two charts and its batch-size table."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from efficientnet.errors import ConfigError
from experiments.planner.calibration import REFERENCE, plan_on
from experiments.planner.plan import Plan
from experiments.planner.report import batch_table
from experiments.planner.systems import SYSTEMS
from experiments.planner.validation import PUBLISHED, PUBLISHED_HOURS
from experiments.planner.workload import Workload

CHARTED = (
    'ipu_pod16',
    'ipu_pod32',
    'ipu_pod64',
    'ipu_pod128',
    'ipu_pod256',
    'bow_pod16',
    'bow_pod64',
    'bow_pod256',
    'dgx_a100_8',
    'dgx_a100_64',
    'dgx_h100_8',
    'dgx_h200_8',
    'tpu_v3_1024',
    'tpu_v4_512',
)
CHARTS = {'images_per_second': 'images/s', 'hours': 'hours'}
NOTES = (
    "IPUs run the reference's program at the micro-batch given, others this trainer at the fastest that fits. "
    'Predictions start from Bow Pod16, 1 × DGX A100 and TPU v3-1024, each at one workload of its own; micro-batches '
    'below 16 come out too fast on GPUs and TPUs. What stands in brackets does not fit, and would be so if it did.'
)
DASHES = {
    'images_per_second': 'dashes: published, of Mk2 unconfirmed',
    'hours': 'dashes: from published images/s, and the published 1.8 hours',
}


def sweep(workload: Workload) -> list[Plan]:
    """Returns the plans of a workload on `CHARTED`.

    IPUs take the micro-batch given, as the reference does; on other systems it is the fastest that fits.

    Args:
        workload: What.

    Raises:
        ConfigError: A size does not divide, or an option is unknown.
    """
    plans = []
    for name in CHARTED:
        chosen = workload if SYSTEMS[name].family == 'ipu' else _left_open(workload)
        plans.append(plan_on(name, chosen))
    return plans


def _left_open(workload: Workload) -> Workload:
    return dataclasses.replace(workload, micro_batch=0, stages=0, splits='auto')


def published_numbers(plans: Sequence[Plan], value: str) -> Mapping[str, list[float]]:
    """Returns what was published of the plans' systems, by name.

    Of other networks than the reference's nothing was; nor hours of other runs than its 350 epochs.

    Args:
        plans: A system each.
        value: 'images_per_second', or 'hours': those published as hours, and those that published speeds make.
    """
    found: dict[str, list[float]] = {}
    for plan in plans:
        name = plan.system.name
        if not _same(plan.workload, 'model', 'group_size', 'pixels'):
            continue
        numbers = [speed for system, speed, _ in PUBLISHED if system == name]
        if value == 'hours':
            numbers = [plan.hours * plan.images_per_second / speed for speed in numbers]
            if _same(plan.workload, 'epochs', 'examples'):
                numbers += [hours for system, hours, _ in PUBLISHED_HOURS if system == name]
        if numbers:
            found[name] = numbers
    return found


def _same(workload: Workload, *fields: str) -> bool:
    """Whether a workload has these in common with the reference's."""
    return all(getattr(workload, field) == getattr(REFERENCE, field) for field in fields)


def describe(workload: Workload) -> str:
    """Returns what is trained, for a title."""
    return (
        f'{workload.model.upper()} G{workload.group_size}, {workload.pixels} pixels, '
        f'batch {workload.global_batch:,}, {workload.epochs:g} epochs'
    )


def write(plans: Sequence[Plan], folder: pathlib.Path) -> str:
    """Draws both charts into a folder, writes the batch-size table beside them and returns it.

    Raises:
        ConfigError: The folder cannot be written.
    """
    from matplotlib.figure import Figure

    from experiments.planner.charts import draw_bars

    text = f'{describe(plans[0].workload)}\n\n{batch_table(plans)}\n\n{NOTES}'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for value, what in CHARTS.items():
            figure = Figure(figsize=(8, 4), layout='constrained')
            published = published_numbers(plans, value)
            title = f'{describe(plans[0].workload)}: {what}{f"; {DASHES[value]}" if published else ""}'
            draw_bars(figure.subplots(), plans, value, title, published)
            figure.savefig(folder / f'{value}.png', dpi=100)
        (folder / 'batch_sizes.md').write_text(text + '\n')
    except OSError as error:
        raise ConfigError(f'--out={folder} cannot be written: {error.strerror}') from None
    return text
