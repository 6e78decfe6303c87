import os
import signal
import time

import pytest

from efficientnet.loop.interrupt import Interrupt, Interrupted


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_remembered_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert not interrupt.requested()
        os.kill(os.getpid(), number)
        assert interrupt.requested()
        assert interrupt.number == number
        # A second one ends the process, whatever that is computing.
        assert signal.getsignal(number) == (signal.SIG_DFL if before is signal.default_int_handler else before)
    assert signal.getsignal(number) == before


def test_long_work_is_left_behind_on_a_signal():
    with Interrupt() as interrupt:
        start = time.monotonic()

        def work():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

        with pytest.raises(Interrupted, match='SIGTERM') as caught:
            interrupt.run(work)
        assert time.monotonic() - start < 3
        assert caught.value.number == signal.SIGTERM


def test_work_returns_and_raises():
    with Interrupt() as interrupt:
        assert interrupt.run(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            interrupt.run(lambda: 1 // 0)
