"""Ctrl-C, which a terminal sends to all processes of a command: only the first one answers it."""

import signal
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
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
