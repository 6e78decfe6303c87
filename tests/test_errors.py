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


def test_standard_output_that_is_closed_is_written_to_in_vain(monkeypatch):
    monkeypatch.setattr(sys, 'stdout', None)
    with one_line():
        print('seen by nobody')
    sys.stdout.close()


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs a disk that is full')
def test_standard_output_that_is_full(capfd):
    with open('/dev/full', 'w') as out, contextlib.redirect_stdout(out):
        with pytest.raises(SystemExit) as left, one_line():
            print('does not fit')
        assert left.value.code == 2
    assert capfd.readouterr().err == 'error: standard output cannot be written: No space left on device\n'


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs a disk that is full')
def test_a_run_goes_on_when_its_words_do_not_fit():
    with open('/dev/full', 'w') as out, contextlib.redirect_stdout(out):
        for _ in range(2):
            say('step 1')


def test_what_a_terminal_does_not_have_is_escaped(capfd):
    with (
        open(sys.stdout.fileno(), 'w', encoding='latin-1', closefd=False) as out,
        contextlib.redirect_stdout(out),
        one_line(),
    ):
        say('compiling …', os.fsdecode(b'/photos/\xff'))
    assert capfd.readouterr().out == 'compiling \\u2026\n/photos/\\udcff\n'


def test_a_run_goes_on_when_nobody_reads_on():
    with nobody_reads():
        with pytest.raises(BrokenPipeError):
            os.write(sys.stdout.fileno(), b'step 0')
        say('step 1')
        os.write(sys.stdout.fileno(), b'step 2')  # goes nowhere
