"""Signals wait for the end of a block, once."""

import os
import signal
import threading

import pytest

from vistok.eval.interrupts import postponed_interrupts


@pytest.fixture
def sigterm(monkeypatch):
    """SIGTERM raises KeyboardInterrupt."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    yield interrupt
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_block(number, sigterm):
    done = []
    with pytest.raises(KeyboardInterrupt):
        with postponed_interrupts():
            os.kill(os.getpid(), number)
            done.append("the rest")
        done.append("behind it")
    assert done == ["the rest"]
    assert signal.getsignal(signal.SIGTERM) is sigterm
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_signal_does_not_wait(sigterm):
    done = []
    with pytest.raises(KeyboardInterrupt), postponed_interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("between")
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("the rest")
    assert done == ["between"]
    assert signal.getsignal(signal.SIGTERM) is sigterm


def test_a_signal_that_ends_the_process_still_does():
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with postponed_interrupts():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler


def test_other_threads_are_left_alone():
    seen = []

    def work():
        with postponed_interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
