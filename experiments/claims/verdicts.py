"""Statistics of the claims: means over seeds, intervals of their differences, and what those say.

A run that diverged counts with the accuracy of guessing: leaving it out would make a setting that fails half of the
time look as good as its better half.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from experiments.claims.table import Claim, Comparison

LEVEL = 0.95  # of the intervals, each for itself
ENOUGH = 5  # seeds; a verdict takes as many of each setting

HOLDS, CONTRADICTED, OPEN, MEASURED = 'holds', 'does not hold', 'undecided', 'measured'

Rows = Mapping[str, Mapping[int, Mapping[str, Any]]]  # by setting and seed: what is known of the run


@dataclasses.dataclass(frozen=True)
class Sample:
    """A mean over seeds with its standard deviation (of one run, n − 1 in the denominator; nan for one seed)."""

    mean: float
    sd: float
    n: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference of means with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Finding:
    """What became of a comparison."""

    comparison: Comparison
    a: Sample | None  # None without a run
    b: Sample | None
    difference: Difference | None  # None with fewer than two seeds of either
    verdict: str
    diverged: int  # runs among both


def sample(values: Sequence[float]) -> Sample | None:
    """Returns mean and standard deviation of some numbers, None of none."""
    if not values:
        return None
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return Sample(float(np.mean(values)), sd, len(values))


def welch(a: Sample, b: Sample) -> Difference:
    """Returns the interval of mean(a) − mean(b), for samples of unequal variance.

    With u = s²/n of each, the standard error is √(u_a + u_b), and t has
    (u_a + u_b)² / (u_a²/(n_a − 1) + u_b²/(n_b − 1)) degrees of freedom.

    Source: Welch, Biometrika 34 (1947), 28-35.
    """
    u, v = a.sd**2 / a.n, b.sd**2 / b.n
    freedom = (u + v) ** 2 / (u**2 / (a.n - 1) + v**2 / (b.n - 1)) if u + v else 1.0
    return _interval(a.mean - b.mean, math.sqrt(u + v), freedom)


def paired(differences: Sequence[float]) -> Difference:
    """Returns the interval of a mean of differences that were taken seed by seed (Student's, n − 1)."""
    found = sample(differences)
    return _interval(found.mean, found.sd / math.sqrt(found.n), found.n - 1)


def judge(difference: Difference, expected: tuple[float, float]) -> str:
    """Says whether an interval lies inside the bounds that a claim expects, outside, or across one of them."""
    low, high = expected
    if low < difference.low and difference.high < high:
        return HOLDS
    if difference.high <= low or high <= difference.low:
        return CONTRADICTED
    return OPEN


def find(comparison: Comparison, rows: Rows) -> Finding:
    """Compares two settings.

    Args:
        comparison: Which, and what is expected.
        rows: Of `collect`.
    """
    a, b = rows.get(comparison.a, {}), rows.get(comparison.b, {})
    if comparison.paired:
        both = sorted(a.keys() & b.keys())
        a, b = {seed: a[seed] for seed in both}, {seed: b[seed] for seed in both}
    of_a, of_b = _numbers(a, comparison.of_a), _numbers(b, comparison.of_b)
    samples = sample(list(of_a.values())), sample(list(of_b.values()))
    fewest = min(len(of_a), len(of_b))
    difference, verdict = None, OPEN
    if fewest > 1:
        difference = paired([of_a[seed] - of_b[seed] for seed in of_a]) if comparison.paired else welch(*samples)
    if comparison.expected is None:
        verdict = MEASURED
    elif fewest >= ENOUGH:
        verdict = judge(difference, comparison.expected)
    diverged = {(row['setting'], row['seed']) for row in [*a.values(), *b.values()] if row['error']}
    return Finding(comparison, *samples, difference, verdict, len(diverged))


def conclude(claim: Claim, rows: Rows) -> tuple[str, list[Finding]]:
    """Returns the verdict on a claim, and what became of its comparisons: it takes all of them, and fails with one."""
    findings = [find(comparison, rows) for comparison in claim.comparisons]
    verdicts = [finding.verdict for finding in findings if finding.comparison.expected]
    for verdict in (CONTRADICTED, OPEN):
        if verdict in verdicts:
            return verdict, findings
    return HOLDS, findings


def _numbers(rows: Mapping[int, Mapping[str, Any]], name: str) -> dict[int, float]:
    """One number a seed, where there is one; of a run that diverged the accuracy of guessing, and no other number."""
    guessing = name.startswith('test_accuracy')
    known = {seed: row for seed, row in rows.items() if (guessing if row['error'] else row[name] is not None)}
    return {seed: 1 / row['classes'] if row['error'] else row[name] for seed, row in known.items()}


def _interval(mean: float, error: float, freedom: float) -> Difference:
    reach = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    return Difference(mean, mean - reach, mean + reach)
