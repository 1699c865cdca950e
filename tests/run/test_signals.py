import os
import runpy
import signal
import threading

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from dist_vlcl.config import hydra_main
from dist_vlcl.options import split_options
from dist_vlcl.run import signals
from dist_vlcl.run.signals import Preemption, line_of_user


@pytest.fixture
def default_hangup():
    """SIGHUP as in a terminal; under nohup it is ignored."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_a_signal_raises_the_flag_and_nothing_else(number, default_hangup):
    with Preemption() as preemption:
        assert not preemption.requested
        os.kill(os.getpid(), number)
        assert preemption.requested


def test_term_and_usr1_may_come_again():
    with Preemption() as preemption:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert preemption.requested


@pytest.fixture
def python_s_own_interrupt():
    """A job in a shell's background starts with SIGINT ignored, and its interpreter then leaves it that way."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_second_interrupt_interrupts(python_s_own_interrupt):
    with pytest.raises(KeyboardInterrupt), Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.requested
        os.kill(os.getpid(), signal.SIGINT)


def test_a_hang_up_that_nohup_has_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Preemption() as preemption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not preemption.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_old_handlers_are_back_afterwards():
    before = {number: signal.getsignal(number) for number in Preemption.SIGNALS}
    with Preemption():
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGINT)
    assert {number: signal.getsignal(number) for number in Preemption.SIGNALS} == before


def test_a_thread_that_cannot_install_handlers_goes_without():
    seen = []

    def enter() -> None:
        with Preemption() as preemption:
            seen.append(preemption.requested)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [False]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_launcher_ends_its_traceback_with_the_error_of_a_rank(rank, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["train", "seed=-1"])
    with pytest.raises(SystemExit):
        hydra_main(print)
    assert capsys.readouterr().err == ("" if rank else "error: seed=-1: give a number of at least 0 and at most 1e+18\n")
    failure = ProcessFailure(local_rank=rank, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    said = str(ChildFailedError("dist_vlcl.train", {rank: failure}))
    assert "traceback : error: seed=-1: give a number of at least 0" in said


@pytest.mark.parametrize("wrong", ["torch.cat([torch.ones(3), torch.ones(4, 4)])", "torch.optim.SGD([])", "json.loads('no')"])
def test_an_error_is_shown_with_the_line_of_the_user_s_own_code_in_which_it_arose(wrong, tmp_path, monkeypatch):
    own = tmp_path / "dist_vlcl_own.py"
    own.write_text(f"import json\nimport torch\n\n\ndef slope():\n    return {wrong}\n")
    with pytest.raises((RuntimeError, ValueError)) as raised:
        runpy.run_path(str(own))["slope"]()
    with monkeypatch.context() as patch:
        patch.setattr(signals, "__file__", str(tmp_path / "dist_vlcl" / "run" / "signals.py"))  # the package is beside the user's file
        assert line_of_user(raised.value) == f" ({own}:6)"
    with pytest.raises(ValueError) as raised:
        split_options(["word"])
    error = raised.value
    assert __file__ in line_of_user(error) and line_of_user(error.with_traceback(error.__traceback__.tb_next)) == ""
