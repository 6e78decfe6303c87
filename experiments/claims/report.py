"""The table of claims as text."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.claims.table import Claim, Scale, settings
from experiments.claims.verdicts import ENOUGH, Finding, Rows, Sample, conclude
from experiments.trainer import overridden


def show(claims: Mapping[str, Claim], rows: Rows) -> str:
    """Returns every claim with its verdict and what it rests on, and how to read it.

    Args:
        claims: By short name.
        rows: Of `runs.collect`.
    """
    lines = []
    for name, claim in claims.items():
        verdict, findings = conclude(claim, rows)
        lines += [f'{name}: {claim.title}: {verdict.upper()}', *map(describe, findings), '']
    lines.append(
        'Mean ± standard deviation over n seeds; in brackets the 95 % interval of the difference (Welch; by seed where '
        f'paired). With {ENOUGH} seeds of both, a comparison holds if the interval lies in the expected bounds, and '
        'does not if it lies outside. Bounds and differences are points of a percent.'
    )
    return '\n'.join(lines)


def legend(scale: Scale, names: Sequence[str], overrides: Sequence[str] = ()) -> str:
    """Returns what the settings are: what all of them have in common, and what each has besides.

    Args:
        scale: Of the settings.
        names: Of the settings.
        overrides: --config.FIELD=VALUE of all runs.
    """
    every = settings(scale)
    common = scale.changes | {'global_batch': scale.batches[0]}
    common = {name: value for name, value in common.items() if name not in overridden(overrides)}
    given = ''.join(f', {argument}' for argument in overrides)
    lines = [f'Every setting is {scale.recipe} with {fields(common)}{given}. Beside that']
    for name in names:
        setting = every[name]
        start = f'from the weights of {setting.starts_from!r}, ' if setting.starts_from else ''
        devices = f' on {setting.cpu_devices} virtual devices' if setting.cpu_devices else ''
        lines.append(f'  {name}: {start}{fields(setting.changes) or "nothing"}{devices}')
    return '\n'.join(lines)


def fields(changes: Mapping[str, Any]) -> str:
    """Returns 'epochs 2, model.width 0.5'."""
    return ', '.join(
        f'{name} {value:.4g}' if isinstance(value, float) else f'{name} {value}' for name, value in changes.items()
    )


def describe(finding: Finding) -> str:
    """Returns one comparison as a line."""
    one, of = finding.comparison, finding.comparison.of_a
    seconds = of == 'seconds'
    averaged = ' averaged' if of.endswith('averaged') else ''
    left, right = sample_text(finding.a, seconds), sample_text(finding.b, seconds)
    text = f'  {one.a}{averaged} {left} − {one.b} {right}'
    if finding.difference:
        low, mean, high = (_number(getattr(finding.difference, name), seconds) for name in ('low', 'mean', 'high'))
        text += f' = {mean} [{low}, {high}]{" paired" if one.paired else ""}'
    if one.expected:
        text += f'; expected {bounds_text(one.expected, seconds)}: {finding.verdict}'
        fewest = min(side.n if side else 0 for side in (finding.a, finding.b))
        text += f' ({fewest} of {ENOUGH} seeds)' if fewest < ENOUGH else ''
    if finding.diverged:
        text += f'; {finding.diverged} diverged' + ('' if seconds else ' and count as guessing')
    return text


def sample_text(sample: Sample | None, seconds: bool = False) -> str:
    """Returns '97.5 ± 0.3 % (n=5)'."""
    if sample is None:
        return '(n=0)'
    unit, factor = ('s', 1) if seconds else ('%', 100)
    spread = '' if math.isnan(sample.sd) else f' ± {factor * sample.sd:.1f}'
    return f'{factor * sample.mean:.1f}{spread} {unit} (n={sample.n})'


def bounds_text(bounds: tuple[float, float], seconds: bool = False) -> str:
    """Returns 'above -2.0', 'below +0.0' or '-2.0 to +2.0', in points of a percent or in seconds."""
    low, high = (_number(bound, seconds) for bound in bounds)
    if math.isinf(bounds[1]):
        return f'above {low}'
    return f'below {high}' if math.isinf(bounds[0]) else f'{low} to {high}'


def _number(value: float, seconds: bool) -> str:
    """A difference: in seconds, or in points of a percent."""
    return f'{value if seconds else 100 * value:+z.1f}'
