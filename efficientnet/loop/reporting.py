"""What a person and a notebook see of a run: progress lines, metrics.csv, TensorBoard events, JSON files."""

import csv
import pathlib
import time

import jax
import numpy as np
from tensorboard.summary import Writer

from efficientnet.errors import mute_stdout
from efficientnet.loop.assemble import Parts
from efficientnet.parallel.pipeline import timetable
from efficientnet.parallel.processes import first
from efficientnet.parallel.stages import stage_blocks

COLUMNS = (
    'step',  # updates so far, skipped ones counted
    'epoch',
    'train_loss',  # mean since the row before
    'train_accuracy',
    'learning_rate',
    'images_per_second',
    'gradient_norm',
    'update_norm',
    'weight_norm',
    'loss_scale',
    'skipped',  # updates that were not finite, in the whole run
    'test_loss',
    'test_accuracy',
    'test_top5',
    'test_accuracy_averaged',  # weights averaged over epochs
    'test_accuracy_update_average',  # weights averaged over updates
)


def say(*lines: str) -> None:
    """Prints lines for a person, at once; in process 0 only. If nobody reads them, the run goes on."""
    if first() and lines:
        try:
            print(*lines, sep='\n', flush=True)
        except OSError:
            mute_stdout()


def duration(seconds: float) -> str:
    """Returns '1:02:03' or '2:03'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


def describe(parts: Parts) -> list[str]:
    """Returns the lines that say what is about to be run on what."""
    config, layout, policy = parts.config, parts.grid.layout, parts.rule.policy
    model, train, test = config.model, parts.train_source, parts.test_source
    device = parts.grid.devices[0]
    return [
        f'model    {model.variant}, group size {model.group_size}, norm {model.norm}, {config.image_size} pixels: '
        f'{parts.packings.params.size:,} parameters',
        f'data     {config.dataset}: {train.num_examples:,} training and {test.num_examples:,} test images of '
        f'{len(train.classes):,} classes',
        f'batch    {layout.global_batch} = micro-batch {layout.micro_batch} × {layout.replicas} replicas × '
        f'accumulation {layout.accumulation}; {parts.total_steps:,} updates',
        *_stages(parts),
        f'numbers  {policy.name} ({policy.compute} compute, {policy.master} weights'
        + (f', {config.precision.rounding} rounding' if policy.rounds else '')
        + f'), {config.optimizer.name}',
        f'devices  {len(parts.grid.devices)} × {device.device_kind} ({device.platform})'
        + (f' in {layout.processes} processes' if layout.processes > 1 else '')
        + f', jax {jax.__version__}',
    ]


def _stages(parts: Parts) -> list[str]:
    layout = parts.grid.layout
    if layout.stages == 1:
        return []
    blocks = ' | '.join(f'{names[0]} … {names[-1]}' for names in stage_blocks(parts.model.spec, layout.splits))
    ticks = len(timetable(layout.schedule, layout.stages, layout.accumulation).forward)
    lines = [
        f'stages   {blocks}; {layout.schedule} schedule, {layout.accumulation} micro-batches in {ticks} ticks, '
        f'recompute {layout.recompute}'
    ]
    if layout.schedule == 'grouped' and 2 * layout.accumulation < ticks:
        lines.append(
            f'hint     the pipeline rests more than it works, {ticks - layout.accumulation} of {ticks} ticks; raise '
            f'global_batch, or lower micro_batch or replicas, for an accumulation count of {2 * (layout.stages - 1)}'
        )
    return lines


class Clock:
    """Seconds since the start, split into training and the rest; compilation apart. Survives restarts."""

    def __init__(self, facts: dict[str, float]) -> None:
        self.seconds = facts.get('seconds', 0.0)  # all, compilation and evaluation too
        self.training = facts.get('training_seconds', 0.0)  # spent in updates
        self.compiling = facts.get('compile_seconds', 0.0)
        self.steps = facts.get('timed_steps', 0)  # updates made within `training`
        self._last = time.perf_counter()

    def tick(self, kind: str | None = None) -> None:
        """Books the time since the last tick as 'training', 'compiling', or None for neither."""
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        self.seconds += elapsed
        if kind:
            setattr(self, kind, getattr(self, kind) + elapsed)

    def facts(self) -> dict[str, float]:
        """Returns what the constructor needs to go on counting."""
        return {
            'seconds': self.seconds,
            'training_seconds': self.training,
            'compile_seconds': self.compiling,
            'timed_steps': self.steps,
        }


class Report:
    """Collects the metrics of updates and writes a row of them where asked."""

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        step: int,
        total_steps: int,
        epochs_per_step: float,
        global_batch: int,
        clock: Clock,
    ) -> None:
        self._total_steps, self._epochs_per_step = total_steps, epochs_per_step
        self._global_batch, self._clock = global_batch, clock
        self._sums = np.zeros(3)  # loss, correct, count
        self._latest: dict[str, float] = {}
        self._row_start = (clock.steps, clock.training)
        self._start = (step, clock.seconds - clock.compiling)
        self._path = workdir / 'metrics.csv'
        self._last = _forget_rows_after(self._path, step)
        self._open()
        self._events = Writer(str(workdir))

    def _open(self) -> None:
        self._file = self._path.open('a', newline='')
        self._csv = csv.DictWriter(self._file, COLUMNS)

    def add(self, metrics: dict[str, float]) -> None:
        """Takes in the metrics of one update."""
        self._latest = metrics
        self._sums += [self._latest[name] for name in ('loss', 'correct', 'count')]
        self._clock.steps += 1

    def row(self, step: int, evaluation: dict[str, float] | None = None) -> None:
        """Writes a row of metrics.csv, the same to TensorBoard, and a progress line."""
        values = {'step': step, 'epoch': round(step * self._epochs_per_step, 4)}
        if self._sums[2]:
            loss, correct, count = self._sums
            values |= {'train_loss': loss / count, 'train_accuracy': correct / count}
        steps, seconds = self._row_start
        if self._clock.steps > steps and self._clock.training > seconds:
            rate = (self._clock.steps - steps) * self._global_batch / (self._clock.training - seconds)
            values['images_per_second'] = rate
        names = ('learning_rate', 'gradient_norm', 'update_norm', 'weight_norm', 'loss_scale', 'skipped')
        values |= {name: self._latest[name] for name in names if name in self._latest} | (evaluation or {})
        row = {name: _short(value) for name, value in values.items()}
        if self._last.get('step') == str(step):  # it was written, without what is made up for now
            row = self._last | row
            self._file.close()
            _forget_rows_after(self._path, step - 1)
            self._open()
        self._csv.writerow(row)
        self._file.flush()
        for name, value in values.items():
            if name != 'step':
                self._events.add_scalar(name, value, step)
        self._sums, self._row_start = np.zeros(3), (self._clock.steps, self._clock.training)
        say(self._line(values, evaluation))

    def close(self) -> None:
        """Writes what is left and closes the files."""
        try:
            self._events.close()
        finally:
            self._file.close()

    def _line(self, values: dict[str, float], evaluation: dict[str, float] | None) -> str:
        step, width = values['step'], len(str(self._total_steps))
        total_epochs = self._total_steps * self._epochs_per_step
        digits = 1 if total_epochs >= 1 else 3
        parts = [
            f'epoch {values["epoch"]:.{digits}f}/{total_epochs:.{digits}f}',
            f'step {step:{width}}/{self._total_steps}',
        ]
        if 'train_loss' in values:
            parts += [f'loss {values["train_loss"]:.4f}', f'accuracy {values["train_accuracy"]:6.2%}']
        if 'images_per_second' in values:
            parts.append(f'{values["images_per_second"]:.0f} images/s')
        first, start = self._start
        if step > first:
            # Evaluations and checkpoints are in it, since there are more to come; compilation is over.
            pace = (self._clock.seconds - self._clock.compiling - start) / (step - first)
            parts.append(f'ETA {duration(pace * (self._total_steps - step))}')
        if values.get('skipped'):
            parts.append(f'skipped {values["skipped"]:.0f}')
        if evaluation:
            parts.append(f'test accuracy {evaluation_text(evaluation)}')
        return '  '.join(parts)


def evaluation_text(evaluation: dict[str, float]) -> str:
    """Returns '97.50% (top 5 99.90%, averaged 98.00%)'."""
    others = [f'top 5 {evaluation["test_top5"]:.2%}']
    labels = {'test_accuracy_averaged': 'averaged', 'test_accuracy_update_average': 'average of updates'}
    others += [f'{label} {evaluation[name]:.2%}' for name, label in labels.items() if name in evaluation]
    return f'{evaluation["test_accuracy"]:.2%} ({", ".join(others)})'


def _short(value: float) -> float | str:
    return f'{value:.7g}' if isinstance(value, float) else value


def _forget_rows_after(path: pathlib.Path, step: int) -> dict[str, str]:
    """Leaves a file with a header and the rows up to a step, and returns the last: those after it are written again."""
    rows = []
    if path.exists():
        with path.open(newline='') as file:
            # A killed process may leave half a row, which lacks its last columns.
            rows = [row for row in csv.DictReader(file) if None not in row.values() and int(row['step']) <= step]
    draft = path.with_suffix('.tmp')
    with draft.open('w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    draft.replace(path)
    return rows[-1] if rows else {}
