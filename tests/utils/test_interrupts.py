import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from netfission.utils.interrupts import no_interrupts

BLOCKED = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs masks of signals as POSIX has them")


def blocked_in_a_new_process() -> bool:
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=True)
    return done.stdout == "True\n"


def test_a_process_started_within_gets_no_interruption() -> None:
    with no_interrupts():
        assert blocked_in_a_new_process()
    assert not blocked_in_a_new_process()


def test_an_interruption_waits_for_the_end() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - it is raised at the end
        with no_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("all")
        done.append("too much")
    assert done == ["all"]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_an_interruption_that_another_thread_receives_waits_as_well() -> None:
    done: list[str] = []
    ready = threading.Event()
    end = threading.Event()
    other = threading.Thread(target=lambda: (ready.set(), end.wait()))
    other.start()
    ready.wait()
    try:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - it is raised at the end
            with no_interrupts():
                signal.pthread_kill(other.ident, signal.SIGINT)
                time.sleep(0.1)
                done.append("all")
            done.append("too much")
    finally:
        end.set()
        other.join()
    assert done == ["all"]


STUCK = """
import signal, sys, time
from netfission.utils.interrupts import ended_if_stuck
signal.signal(signal.SIGTERM, lambda *_: None)  # not answered, as by a main thread that waits
signal.signal(signal.SIGINT, lambda *_: None)
def wait(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
with ended_if_stuck(lambda: print("cleaned", flush=True), "stopped", 0.2):
    signal.raise_signal(signal.SIGWINCH)  # asks for nothing
    signal.raise_signal(int(sys.argv[1]))
    wait(float(sys.argv[2]))
wait(0.4)
print("went on", signal.set_wakeup_fd(-1))
"""


@pytest.mark.parametrize(
    ("number", "seconds", "ended"),
    [
        (signal.SIGTERM, 60, (143, "cleaned\n", "netfission: stopped\n")),
        (signal.SIGINT, 60, (130, "cleaned\n", "netfission: stopped\n")),
        (signal.SIGTERM, 0.01, (0, "went on -1\n", "")),
    ],
)
def test_a_process_that_does_not_answer_an_interruption_is_ended(number, seconds, ended):
    command = [sys.executable, "-c", STUCK, str(int(number)), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == ended
