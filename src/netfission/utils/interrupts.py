"""Ctrl-C and SIGTERM in commands of several processes."""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial

_STATUSES: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 and the number of the signal


@contextmanager
def no_interrupts() -> Iterator[None]:
    """Put Ctrl-C off until the end; processes that are started within never get it.

    A process that helps another one, such as a worker that decodes images, would print a traceback. It ends
    with the process that started it.

    Example:
        >>> import multiprocessing
        >>> with no_interrupts():
        ...     process = multiprocessing.get_context("spawn").Process(target=print)
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    received = []
    handler = signal.getsignal(signal.SIGINT)
    # The mask is of this thread alone. Another one may take the signal; Python answers in the main thread.
    defers = threading.current_thread() is threading.main_thread() and handler is not None
    if defers:
        signal.signal(signal.SIGINT, lambda *_: received.append(True))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if defers:
            signal.signal(signal.SIGINT, handler)
            if received:
                signal.raise_signal(signal.SIGINT)


@contextmanager
def ended_if_stuck(clean_up: Callable[[], object], message: str, seconds: float = 5.0) -> Iterator[None]:
    """End the process if it was interrupted, and is still within this context some time later.

    Python answers a signal in the main thread, between two steps of Python. Where this thread waits for
    another process, it may never come to it; or it comes to it, and then waits for a process that waits for
    it. Nothing happens outside of the main thread, or where signals have no handler of Python's.

    Args:
        clean_up: called before the process ends, from another thread.
        message: what to say then, on standard error.
        seconds: for which the process may go on after SIGINT or SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # works while the main thread waits
    _forget_in_children()

    def watch() -> None:
        if (status := _next_status(reader)) is None:
            return
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([reader], [], [], left)[0] and not os.read(reader, 1):
                return  # the context has ended
        with suppress(Exception):
            clean_up()
        with suppress(OSError):
            os.write(2, f"netfission: {message}\n".encode())
        os._exit(status)

    watcher = threading.Thread(target=watch, name="interrupts", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        watcher.join()
        os.close(reader)


def _next_status(reader: int) -> int | None:
    """Wait for a signal that asks to end, and return its status; None once the other end is closed."""
    while number := os.read(reader, 1):
        if number[0] in _STATUSES:
            return _STATUSES[number[0]]
    return None


@cache
def _forget_in_children() -> None:
    """Let no copy of this process, such as a worker that decodes images, write its signals here."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=partial(signal.set_wakeup_fd, -1))
