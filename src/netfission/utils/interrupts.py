"""Ctrl-C, which a terminal sends to all processes of a command: only the first one answers it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


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
