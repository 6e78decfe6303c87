"""Training and evaluating: what happens between a config and a summary, top to bottom."""

import contextlib
import pathlib
from typing import Any

import jax
import ml_collections

from efficientnet.errors import ConfigError, DivergedError, RunError
from efficientnet.loop.assemble import Parts, assemble
from efficientnet.loop.checkpoints import Checkpoints
from efficientnet.loop.evaluation import run_evaluation
from efficientnet.loop.files import CHECKPOINTS, write_json
from efficientnet.loop.host_memory import make_room
from efficientnet.loop.interrupt import Interrupt, Interrupted
from efficientnet.loop.programs import compile_programs
from efficientnet.loop.reporting import Clock, Report, describe, duration, evaluation_text, say
from efficientnet.loop.settings import for_evaluation
from efficientnet.loop.workdir import claim, has_checkpoint, stored_config, writing
from efficientnet.parallel import processes
from efficientnet.parallel.layout import largest_replicas
from efficientnet.parallel.train_state import TrainState, pack_state, unpack_state
from efficientnet.parallel.update import read_metrics
from efficientnet.weights.dataset_facts import check_classes, facts_of
from efficientnet.weights.initial import fit_weights, read_weights

Tree = Any


def train(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains a run to its end, going on from its newest whole checkpoint if there is one.

    Args:
        config: All fields of configs/base.py.
        workdir: Holds config.json, checkpoints, metrics.csv, TensorBoard events and, at the end, summary.json.

    Returns:
        What summary.json holds.

    Raises:
        ConfigError, DataError: Before anything is computed.
        RunError: The run cannot go on.
        Interrupted: SIGTERM or Ctrl-C; the state is saved.
    """
    parts = _assemble(config)
    say(*describe(parts))
    with contextlib.ExitStack() as stack, Interrupt() as interrupt:
        start = processes.from_first(lambda: _start(parts, workdir))
        processes.from_first(lambda: stack.enter_context(claim(workdir, parts)))
        with Run(parts, workdir, interrupt) as run:
            run.restore()
            if run.finished():
                say(f'nothing left to do: {workdir} holds the finished run')
            else:
                run.compile(start=start)
                run.loop()
            return run.summarise()


def evaluate(config: ml_collections.ConfigDict | None, workdir: pathlib.Path) -> dict[str, float]:
    """Evaluates the newest checkpoint of a run, on all devices there are.

    Args:
        config: The run's config, or None to take the one stored in `workdir`.
        workdir: Of a run that has saved a checkpoint.

    Returns:
        The evaluation columns of metrics.csv.
    """
    config = processes.from_first(lambda: stored_config(workdir, config))
    replicas = processes.together(
        lambda: largest_replicas(config.global_batch, jax.device_count(), jax.process_count())
    )
    parts = _assemble(for_evaluation(config, replicas), stored=True)
    processes.from_first(lambda: check_classes(workdir, facts_of(parts.train_source)))
    with Interrupt() as interrupt, Run(parts, workdir, interrupt, owner=False) as run:
        run.restore()
        if not run.position:
            raise processes.agreed(ConfigError(f'{workdir} has no checkpoint to evaluate; train first'))
        run.compile(update=False)
        if not run.evaluate():
            raise processes.agreed(Interrupted(interrupt.number))
    say(f'step {run.position}  test accuracy {evaluation_text(run.evaluation)}')
    return run.evaluation


def _assemble(config: ml_collections.ConfigDict, *, stored: bool = False) -> Parts:
    """Assembles a run in every process, from the same data."""
    parts = processes.together(lambda: assemble(config, stored=stored))
    from input_pipeline import pipeline  # noqa: F401  # TensorFlow, whose seconds would be counted as training

    train_source, test_source = parts.train_source, parts.test_source
    processes.require_same(
        {
            'training examples': train_source.num_examples,
            'test examples': test_source.num_examples,
            'classes': list(train_source.classes),
        }
    )
    return parts


def _start(parts: Parts, workdir: pathlib.Path) -> Tree | None:
    """Reads the weights that a run starts from, if it starts here and now and not from its seed."""
    c = parts.config
    if not c.init_from or has_checkpoint(workdir):
        return None
    found = read_weights(pathlib.Path(c.init_from).expanduser(), c.init_weights)
    variables, line = fit_weights(found, parts.packings, c, parts.rule.policy.master)
    say(*found.complaints, line)
    return variables


class Run:
    """A run in progress: the state on the grid, the position in the stream of batches, and the books kept.

    Used as a context manager, which closes its files and threads.
    """

    def __init__(self, parts: Parts, workdir: pathlib.Path, interrupt: Interrupt, *, owner: bool = True) -> None:
        self.parts, self.workdir, self._interrupt = parts, workdir, interrupt
        self._checkpoints: Checkpoints | None = None  # like the report, in process 0 only
        processes.from_first(lambda: self._open_checkpoints(owner))
        self.position = 0  # batches consumed, which is updates made or skipped
        self.evaluation: dict[str, float] = {}  # the last one
        self._evaluated_at = 0
        self._saved_at = 0
        self._best = {'accuracy': -1.0, 'step': 0}
        self._clock = Clock({})
        self._report: Report | None = None
        self._waiting: jax.Array | None = None
        self._others_leave = False  # some process was asked to, before the update whose metrics were read last

    def _open_checkpoints(self, owner: bool) -> None:
        with writing(self.workdir):
            self._checkpoints = Checkpoints(self.workdir / CHECKPOINTS, self.parts.config.checkpoint.keep, owner=owner)

    def restore(self) -> None:
        """Puts the newest whole checkpoint on the grid, if there is one."""
        parts = self.parts
        shapes = parts.state_shapes()
        plain = jax.eval_shape(lambda state: unpack_state(state, parts.packings), shapes)
        found = processes.from_first(lambda: self._checkpoints.restore_newest(plain))
        if found is None:
            return
        state, facts, complaints = found
        self.position = self._saved_at = facts['position']
        self.evaluation, self._evaluated_at = facts['evaluation'], facts['evaluated_at']
        self._best, self._clock = facts['best'], Clock(facts['clock'])
        self._state = parts.grid.place(pack_state(state, shapes, parts.packings))
        say(*complaints, f'checkpoint of step {self.position} of {parts.total_steps}')

    def finished(self) -> bool:
        """Tells whether all updates are made and their outcome is evaluated."""
        return self.position == self.parts.total_steps == self._evaluated_at

    def compile(self, *, update: bool = True, start: Tree | None = None) -> None:
        """Compiles the programs of the run and books the time; makes the initial weights if none were restored."""
        initial = not self.position
        self._clock.tick()
        say('compiling …')
        self._programs = self._interrupt.run(
            lambda: compile_programs(self.parts, update=update, initial=initial, start=start)
        )
        make_room(self._programs.temporaries)  # in this thread, which calls them
        if initial:
            self._state = self.parts.grid.place(self._programs.initial)
        self._clock.tick('compiling')

    def loop(self) -> None:
        """Makes updates until the end of the run, with evaluations, averages, checkpoints and rows on the way."""
        parts, grid = self.parts, self.parts.grid
        processes.from_first(self._open_books)
        self._round_off()  # an interrupted run may owe an evaluation
        flags = [grid.flag(value) for value in (False, True)]
        for batch in grid.prefetch(parts.train_batches(self.position), parts.config.input.prefetch):
            if self._must_leave():
                self._leave()
            self._state, metrics = self._programs.update(self._state, batch, flags[self._interrupt.requested()])
            del batch  # see Grid.prefetch
            self._read_waiting()
            self._waiting = metrics
            self.position += 1
            if self._programs.epoch_average and self._epochs(self.position) > self._epochs(self.position - 1):
                self._state = self._programs.epoch_average(self._state)
            self._round_off()

    def evaluate(self) -> bool:
        """Evaluates the weights and their averages; False if interrupted."""
        state = self._state
        averages = {'': {'params': state.params, 'batch_stats': state.batch_stats}}
        if state.epoch_average and self._epochs(self.position) > 0:
            averages['_averaged'] = state.epoch_average
        if state.update_average:
            averages['_update_average'] = state.update_average
        evaluation = {}
        for name, variables in averages.items():
            means = run_evaluation(
                self._programs.evaluate,
                self.parts.grid,
                self._programs.gather(variables),
                self.parts.evaluation_batches(),
                stop=self._interrupt.requested,
            )
            if means is None:
                return False
            evaluation[f'test_accuracy{name}'] = means['accuracy']
            if not name:
                evaluation |= {'test_loss': means['loss'], 'test_top5': means['top5']}
        self.evaluation, self._evaluated_at = evaluation, self.position
        return True

    def summarise(self) -> dict[str, Any]:
        """Writes and returns summary.json, and says how the run ended."""
        return processes.from_first(self._summarise)

    def _summarise(self) -> dict[str, Any]:
        parts, layout, clock = self.parts, self.parts.grid.layout, self._clock
        clock.tick()
        state = self._fetch()
        summary = {
            'test_accuracy_averaged': None,
            **self.evaluation,
            'best_test_accuracy': self._best['accuracy'],
            'best_step': self._best['step'],
            'images_per_second': clock.steps * layout.global_batch / clock.training,
            'compile_seconds': clock.compiling,
            'seconds': clock.seconds,
            'steps': self.position,
            'skipped': int(state.skipped),
            'parameters': sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            'replicas': layout.replicas,
            'stages': layout.stages,
            'micro_batch': layout.micro_batch,
            'accumulation': layout.accumulation,
            'global_batch': layout.global_batch,
            'policy': parts.rule.policy.name,
            'seed': parts.config.seed,
            'device': self.parts.grid.devices[0].device_kind,
            'jax': jax.__version__,
        }
        with writing(self.workdir, self.position):
            write_json(self.workdir / 'summary.json', summary)
        damaged = [*parts.damaged_train.values(), *parts.damaged_test.values()]
        say(
            *([f'{len(damaged)} damaged images were left out, such as {damaged[0]}'] if damaged else []),
            f'done: {self.position} steps in {duration(clock.seconds)} ({clock.compiling:.0f} s of it compiling), '
            f'{summary["images_per_second"]:.0f} images/s',
            f'test accuracy {evaluation_text(self.evaluation)}',
        )
        return summary

    def __enter__(self) -> 'Run':
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            with writing(self.workdir, self._saved_at), contextlib.ExitStack() as stack:
                for part in filter(None, (self._report, self._checkpoints)):
                    stack.callback(part.close)
        except RunError:
            if kind is None:
                raise  # else a full disk, say, has been told of by what failed first

    def _open_books(self) -> None:
        """Makes ready what process 0 writes to while the run goes on."""
        parts, layout = self.parts, self.parts.grid.layout
        self._checkpoints.discard_after(self.position)
        with writing(self.workdir, self.position):
            self._report = Report(
                self.workdir,
                step=self.position,
                total_steps=parts.total_steps,
                epochs_per_step=layout.global_batch / parts.train_source.num_examples,
                global_batch=layout.global_batch,
                clock=self._clock,
            )

    def _round_off(self) -> None:
        """After an update: evaluates, writes a row and saves, where each is due."""
        parts, position = self.parts, self.position
        last = position == parts.total_steps
        evaluates = _due(position, parts.evaluate_every, last) and self._evaluated_at != position
        saves = _due(position, parts.checkpoint_every, last) and self._saved_at != position
        logs = _due(position, parts.log_every, last) and self._waiting is not None  # not again where a run goes on
        if position == 0 or not (evaluates or saves or logs):
            return
        self._read_waiting()
        self._clock.tick('training')
        if evaluates and not self.evaluate():
            self._leave()
        if evaluates and self.evaluation['test_accuracy'] > self._best['accuracy']:
            self._best = {'accuracy': self.evaluation['test_accuracy'], 'step': position}
            saves = True
        # An evaluation that was cut off, and is made up for, belongs to the checkpoint that was saved instead.
        saves = saves or (evaluates and self._saved_at == position)
        self._clock.tick()

        def write() -> None:
            if evaluates or logs:
                with writing(self.workdir, self._saved_at):
                    self._report.row(position, self.evaluation if evaluates else None)
            if saves:
                self._write_checkpoint()

        processes.from_first(write)
        self._saved_at = position if saves else self._saved_at
        self._clock.tick()

    def _read_waiting(self) -> None:
        """Waits for the metrics of the last update but one read late, and stops a run that makes no progress."""
        if self._waiting is None:
            return
        metrics, self._waiting = read_metrics(self._waiting), None
        self._others_leave = bool(metrics['stop'])
        if self._report:
            self._report.add(metrics)
        limit, in_row = self.parts.config.precision.max_skipped, int(metrics['skipped_in_row'])
        if in_row >= limit:
            start = ''
            if self._saved_at:
                start = f'; --config.init_from={self.workdir} starts there from the weights of step {self._saved_at}'
            error = DivergedError(
                f'{in_row} updates in a row were not finite (precision.max_skipped={limit}), the last at step '
                f'{self.position}; lower optimizer.rate_per_example or precision.initial_loss_scale in another '
                f'--workdir{start}'
            )
            raise processes.agreed(error)

    def _must_leave(self) -> bool:
        """Tells whether a signal has come: to this process if it is alone, else to any, an update ago."""
        return self._others_leave if self.parts.grid.layout.processes > 1 else self._interrupt.requested()

    def _leave(self) -> None:
        """Saves and raises Interrupted."""
        self._read_waiting()
        self._clock.tick('training')
        if self.position > self._saved_at:
            processes.from_first(self._write_checkpoint)
            self._saved_at = self.position
        error = Interrupted(
            self._interrupt.number,
            f'saved at step {self._saved_at} of {self.parts.total_steps} in {self.workdir}; '
            'the same command goes on from there',
        )
        raise processes.agreed(error)

    def _write_checkpoint(self) -> None:
        accuracy = self.evaluation['test_accuracy'] if self._evaluated_at == self.position else None
        self._clock.tick()
        facts = {
            'evaluation': self.evaluation,
            'evaluated_at': self._evaluated_at,
            'best': self._best,
            'clock': self._clock.facts(),
        }
        state = self._fetch()
        with writing(self.workdir, self._saved_at):
            self._checkpoints.save(self.position, state, facts, accuracy)

    def _fetch(self) -> TrainState:
        """Copies the plain state to the host."""
        return unpack_state(self.parts.grid.fetch(self._state), self.parts.packings)

    def _epochs(self, position: int) -> int:
        """Returns how many whole epochs have gone by."""
        return position * self.parts.config.global_batch // self.parts.train_source.num_examples


def _due(position: int, every: int, last: bool) -> bool:
    """Tells whether something that happens every so many steps, and at the end, happens now."""
    return last or (every > 0 and position % every == 0)
