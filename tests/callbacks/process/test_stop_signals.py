import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from callbacks.process import stop_signals
from callbacks.process.stop_signals import SIGNALS, StopSignals
from tests.processes import HANGS
from tiltmeter.errors import Preempted


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    found = StopSignals()
    handlers = [signal.getsignal(number) for number in SIGNALS]
    found.install()
    yield found
    found.restore()
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


def test_the_first_signal_is_kept_and_the_same_one_again_is_no_second(
    signals: StopSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop_signals, "SAME_SECONDS", HANGS)
    assert signals.code == 0
    signals.has_work = True
    for _ in range(2):
        signal.raise_signal(signal.SIGTERM)
    assert SIGNALS[signals.code - 1] == signal.SIGTERM


def test_without_work_a_signal_is_raised_where_it_comes(signals: StopSignals) -> None:
    for number in SIGNALS:
        with pytest.raises(Preempted, match=number.name):
            signal.raise_signal(number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_the_process_at_once(number: signal.Signals) -> None:
    script = f"""
import signal
from callbacks.process import stop_signals
stop_signals.SAME_SECONDS = 0
signals = stop_signals.StopSignals()
signals.install()
signals.has_work = True
signal.raise_signal({number.value})
print("still here", flush=True)
signal.raise_signal({number.value})
print("never printed", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=HANGS, check=False)
    assert (done.returncode, done.stdout) == (-number, "still here\n"), done.stderr
