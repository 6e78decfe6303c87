"""When each stage of a pipeline works on which micro-batch: a timetable as plain data, which the update follows.

The compiled update is a loop over ticks; in tick t the device of stage s looks up in row t, column s which
micro-batch to take forward and which to take backward, and rests where there is none. What a stage passes on in one
tick its neighbour uses in the next. The last stage takes a micro-batch forward and backward in the same tick.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

NONE = -1  # no micro-batch: the stage rests


class Timetable(NamedTuple):
    """Micro-batches by tick and stage, int32 [ticks, stages] each; `NONE` where a stage rests."""

    forward: np.ndarray
    backward: np.ndarray

    def stash_depth(self, *, first: bool) -> int:
        """Returns how many micro-batches a stage keeps something of at once, from forward to backward.

        In a tick a stage goes backward before it goes forward, so a place is free when the next one needs it. The
        last stage needs none.

        Args:
            first: Whether the first stage keeps something; the images, its input, it has anyway.
        """
        depth = 0
        for stage in range(0 if first else 1, self.forward.shape[1] - 1):
            kept = (self.forward[:, stage] != NONE).cumsum() - (self.backward[:, stage] != NONE).cumsum()
            depth = max(depth, int(kept.max(initial=0)))
        return depth


def grouped(stages: int, count: int) -> Timetable:
    """All stages busy at once: `count` + 2 (stages − 1) ticks.

    At tick t stage s goes forward on micro-batch t − s and backward on t − (2 (stages − 1) − s).

    Args:
        stages: Of the pipeline.
        count: Micro-batches a weight update.

    Source: Graphcore's PipelineSchedule.Grouped, with forward and backward of a tick in one program.
    """
    ticks, stage = np.arange(count + 2 * (stages - 1))[:, None], np.arange(stages)[None]
    return Timetable(_valid(ticks - stage, count), _valid(ticks - (2 * (stages - 1) - stage), count))


def sequential(stages: int, count: int) -> Timetable:
    """One micro-batch after the other, one stage at work at a time: count · (2 stages − 1) ticks.

    It is slow, and keeps one micro-batch in memory: for debugging, and where nothing else fits.

    Args:
        stages: Of the pipeline.
        count: Micro-batches a weight update.

    Source: Graphcore's PipelineSchedule.Sequential.
    """
    period = 2 * stages - 1
    ticks, stage = np.arange(count * period)[:, None], np.arange(stages)[None]
    batch, phase = np.divmod(ticks, period)
    forward = np.where(phase == stage, batch, NONE)
    return Timetable(forward.astype(np.int32), np.where(phase == period - 1 - stage, batch, NONE).astype(np.int32))


SCHEDULES: dict[str, Callable[[int, int], Timetable]] = {'grouped': grouped, 'sequential': sequential}


def timetable(schedule: str, stages: int, count: int) -> Timetable:
    """Returns the timetable of one weight update.

    Args:
        schedule: A key of `SCHEDULES`.
        stages: Of the pipeline.
        count: Micro-batches a weight update, the accumulation count.
    """
    return SCHEDULES[schedule](stages, count)


def _valid(index: np.ndarray, count: int) -> np.ndarray:
    return np.where((index >= 0) & (index < count), index, NONE).astype(np.int32)
