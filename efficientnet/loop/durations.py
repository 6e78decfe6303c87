"""One converter from the durations people write ('70 epochs') to weight updates."""

import math
import re

from efficientnet.errors import ConfigError

UNITS = ('epochs', 'steps', 'examples', '%')


def to_steps(field: str, duration: str, *, num_examples: int, global_batch: int, total_steps: int | None) -> int:
    """Converts a duration to whole weight updates, rounding down.

    Args:
        field: The field's dotted name, for the error message.
        duration: A number and a unit of `UNITS`, such as '70 epochs', '500 steps', '50000 examples', '20 %'.
        num_examples: Examples in an epoch.
        global_batch: Examples a weight update.
        total_steps: Updates in the whole run, which '%' refers to; None where the run's own length is asked.

    Raises:
        ConfigError: The text is not a duration, or is negative.
    """
    return _whole(_updates(field, duration, num_examples, global_batch, total_steps))


def to_interval(field: str, duration: str, *, num_examples: int, global_batch: int, total_steps: int) -> int:
    """Converts how often something happens to weight updates: at least one, or 0 for never where it says 0.

    Args and errors are `to_steps`'s.
    """
    updates = _updates(field, duration, num_examples, global_batch, total_steps)
    return _whole(updates) or math.ceil(updates)


def _updates(field: str, duration: str, num_examples: int, global_batch: int, total_steps: int | None) -> float:
    found = re.fullmatch(r'\s*([\d.]+)\s*(\S+)\s*', duration)
    number, unit = found.groups() if found else ('nan', '')
    unit = unit if unit in UNITS else unit + 's'
    try:
        amount = float(number)
    except ValueError:  # such as '1.2.3'
        amount = math.nan
    if unit not in UNITS or not 0 <= amount < math.inf or (unit == '%' and total_steps is None):
        raise ConfigError(f"{field}={duration!r} is not a duration; write '70 epochs', '500 steps', '20 %', …")
    if unit == '%':
        return amount / 100 * total_steps
    return {'epochs': num_examples, 'steps': global_batch, 'examples': 1}[unit] * amount / global_batch


def _whole(updates: float) -> int:
    """Rounds down, but not for an error in the last digit."""
    return math.floor(updates + 1e-9)
