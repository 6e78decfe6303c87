"""SIGTERM and Ctrl-C as a question the loop asks between updates, so that it can save before it leaves."""

import signal
import threading
from collections.abc import Callable
from typing import Any


class Interrupted(Exception):  # noqa: N818 - not an error
    """The run was asked to leave by the signal of this number; the message says what was saved."""

    def __init__(self, number: int, message: str = 'nothing new to save') -> None:
        self.number = number or signal.SIGTERM  # 0: it came to another process
        super().__init__(f'{signal.Signals(self.number).name}: {message}')


class Interrupt:
    """Remembers the first SIGTERM or SIGINT; a second one ends the process the usual way.

    Used as a context manager; the handlers that were there come back at its end.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> 'Interrupt':
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def requested(self) -> bool:
        """Tells whether a signal has come."""
        return self.number != 0

    def run(self, work: Callable[[], Any]) -> Any:
        """Runs something long and deaf, such as a compilation, in a thread, and leaves it behind on a signal.

        Raises:
            Interrupted: A signal came first.
        """
        outcome: dict[str, Any] = {}

        def target() -> None:
            try:
                outcome['value'] = work()
            except BaseException as error:
                outcome['error'] = error

        thread = threading.Thread(target=target, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
            if self.requested():
                raise Interrupted(self.number)
        if 'error' in outcome:
            raise outcome['error']
        return outcome['value']

    def _note(self, number: int, _: object) -> None:
        self.number = number
        for known, handler in self._before.items():
            # Python's own handler of Ctrl-C would wait until the thread comes back from what it computes.
            signal.signal(known, signal.SIG_DFL if handler is signal.default_int_handler else handler)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
