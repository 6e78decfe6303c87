"""How every command ends."""

import contextlib
import os
import signal
import sys

import pytest

from efficientnet.errors import ConfigError, DivergedError, RunError, one_line
from efficientnet.loop.reporting import say
from input_pipeline import DataError


@pytest.mark.parametrize(
    ('error', 'code'),
    [(ConfigError('a\nb'), 2), (DataError('a b'), 2), (RunError('a b'), 2), (DivergedError('a b'), 4)],
)
def test_a_mistake_is_one_line_and_a_status(error, code, capfd):
    with pytest.raises(SystemExit) as left, one_line():
        raise error
    assert left.value.code == code
    assert capfd.readouterr() == ('', 'error: a b\n')
    with pytest.raises(SystemExit) as left, one_line(lambda error: False):
        raise error
    assert left.value.code == code
    assert capfd.readouterr() == ('', '')


def test_ctrl_c_needs_no_words(capfd):
    with pytest.raises(SystemExit) as left, one_line():
        raise KeyboardInterrupt
    assert left.value.code == 128 + signal.SIGINT
    assert capfd.readouterr() == ('', '')


def test_what_is_no_mistake_passes():
    with pytest.raises(ZeroDivisionError), one_line():
        raise ZeroDivisionError


@contextlib.contextmanager
def nobody_reads():
    """Standard output is a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, 'w') as out, contextlib.redirect_stdout(out):
        yield


def test_a_command_ends_when_nobody_reads_on():
    with nobody_reads(), pytest.raises(SystemExit) as left, one_line():
        print('seen by nobody')
    assert left.value.code == 1


def test_a_run_goes_on_when_nobody_reads_on():
    with nobody_reads():
        with pytest.raises(BrokenPipeError):
            os.write(sys.stdout.fileno(), b'step 0')
        say('step 1')
        os.write(sys.stdout.fileno(), b'step 2')  # goes nowhere
