"""What ends a run before its time, and how long it may take to save."""

import os
import signal

import pytest
import torch
from forking import ON_CPU, on_ranks

from flow_grpo.parallel import choose
from flow_grpo.parallel.engine import Ranks
from flow_grpo.parallel.faults.stop import PATIENCE_S, POLL_S, SIGNALS, Stop, Stopped


class Clock:
    """Seconds that pass when the test says so."""

    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def handlers():
    """The system's own handlers, whatever started pytest; those of before come back."""
    held = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, handler in held.items():
        signal.signal(number, handler)


@pytest.fixture
def launched(handlers, monkeypatch):
    """Make a Stop in a process that a launcher started; returns it, its clock and its exits."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    exits, clock = [], Clock()
    monkeypatch.setattr(os, "_exit", exits.append)
    return Stop(Ranks(torch.device("cpu")), clock), clock, exits


def adopt(monkeypatch):
    """Give this process another parent; in a container the first one may be 1."""
    other = os.getppid() + 1
    monkeypatch.setattr(os, "getppid", lambda: other)


def test_without_a_signal_a_run_goes_on(launched):
    stop, clock, exits = launched
    clock.seconds += 1e9
    stop.check()
    assert exits == []


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_for_the_next_check_which_says_how_to_leave(launched, capfd, number):
    stop, clock, exits = launched
    signal.raise_signal(number)
    clock.seconds += 1e9
    with pytest.raises(Stopped, match=f"stopped by {number.name}") as stopped:
        stop.check()
    assert stopped.value.exit_status == 128 + number and exits == []
    said = capfd.readouterr().err
    assert f"{number.name}: ends in order, at once after another one in 5 s" in said


def test_a_run_in_a_shells_background_hears_an_interrupt(handlers):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Stop(Ranks(torch.device("cpu")))
    assert signal.getsignal(signal.SIGINT) != signal.SIG_IGN


def test_a_run_under_nohup_does_not_hear_the_terminal_go(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    Stop(Ranks(torch.device("cpu")))
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_repeated_signal_ends_the_process_only_after_some_patience(launched):
    stop, clock, exits = launched
    signal.raise_signal(signal.SIGTERM)
    clock.seconds += PATIENCE_S
    signal.raise_signal(signal.SIGTERM)  # a launcher passes on what all were sent
    assert exits == []
    clock.seconds += 1.0
    signal.raise_signal(signal.SIGINT)
    assert exits == [128 + signal.SIGINT]


def test_the_death_of_the_launcher_is_a_signal_too(launched, monkeypatch):
    stop, _, _ = launched
    adopt(monkeypatch)
    with pytest.raises(Stopped, match="SIGTERM"):
        stop.check()


def test_a_run_that_nothing_launched_outlives_its_shell(handlers, monkeypatch):
    for name in [n for n in os.environ if n.startswith(("ACCELERATE_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    stop = Stop(Ranks(torch.device("cpu")))
    adopt(monkeypatch)
    stop.check()


def test_alone_a_poll_hears_at_once_however_seldom_ranks_would_meet(launched):
    stop, _, _ = launched
    stop.pace(1e-6)
    stop.poll()
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Stopped):
        stop.poll()


def as_rank():
    ranks = choose.start("no").ranks
    stop = Stop(ranks)
    stop.pace(POLL_S / 3.5 if ranks.is_main else 1e-9)  # the main rank's counts
    heard = 0
    for poll in range(1, 10):
        if poll == 4 and not ranks.is_main:
            signal.raise_signal(signal.SIGTERM)
        try:
            stop.poll()
        except Stopped:
            heard = poll
            break
    assert heard == 6, heard


def test_several_ranks_hear_together_at_every_so_many_th_poll():
    on_ranks(2, ON_CPU, as_rank)
