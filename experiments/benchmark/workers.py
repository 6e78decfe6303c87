"""Processes that build what is to be measured and run it when asked."""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from efficientnet.errors import ConfigError, RunError

Jobs = dict[str, Callable[[], Any]]  # what a job returns, if anything, is answered instead of the time it took


class Worker:
    """A process that builds jobs and times them when asked.

    Args:
        build: Maps what is given to jobs and what is to be known of them.
        *given: Its arguments.
    """

    def __init__(self, build: Callable[..., tuple[Jobs, dict]], *given: Any) -> None:
        context = multiprocessing.get_context('spawn')  # a fork would inherit a JAX that has started
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, given), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, name: str) -> None:
        """Starts a job."""
        self._pipe.send(name)

    def answer(self) -> Any:
        """Waits: at first for the jobs and returns what `build` said of them, then for (wall, processor) seconds.

        Raises:
            ConfigError: The flags cannot work.
            RunError: The process is gone.
        """
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            raise RunError('a measuring process died; what it said is above') from None
        if kind == 'error':
            raise value
        return value

    def run(self, name: str) -> Any:
        """Runs a job and returns its answer: (wall-clock, processor) seconds if it says nothing else."""
        self.send(name)
        return self.answer()

    def stop(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()  # JAX takes a polite signal for a warning that the machine goes away
        self._process.join()


def repeat(piece: Callable[[], None], times: int) -> Callable[[], None]:
    """Returns a job that does something several times."""

    def job() -> None:
        for _ in range(times):
            piece()

    return job


def _serve(pipe: Any, build: Callable, given: Sequence[Any]) -> None:
    """What a worker's process does."""
    os.dup2(2, 1)  # stdout is for the result, and libraries talk there
    try:
        jobs, found = build(*given)
    except (ConfigError, RunError) as error:
        pipe.send(('error', error))
        return
    pipe.send(('ready', found | {'jobs': list(jobs)}))
    while True:
        job = jobs[pipe.recv()]
        wall, core = time.perf_counter(), time.process_time()
        said = job()
        pipe.send(('done', said or (time.perf_counter() - wall, time.process_time() - core)))
