"""Gather the images of many requests into batches for one network."""

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

Image = TypeVar("Image")
T = TypeVar("T")


class FullError(Exception):
    """The largest allowed number of images is in flight already."""


@dataclass(frozen=True, eq=False)
class _QueuedImage(Generic[Image, T]):
    image: Image
    share: float
    answer: asyncio.Future[T]


class Batcher(Generic[Image, T]):
    """Threads that run a network on the images of several requests at once.

    While batches run, images gather for the next one. A batch that is not full waits for images that are
    being decoded, and for no others, so that a single request never waits.

    A batch has the oldest image, so that none waits forever, and those of the others that take least time and
    fit beside it. They come first in it, and are answered first, so that they do not wait for those that take
    long.

    It is a context manager, for use in one event loop. On exit it first answers what is in flight.

    Args:
        run: images → one answer per image, in their order; called in the threads. An answer is handed on as
            soon as it is there.
        threads: number of threads, and so of batches that run at once.
        max_batch: largest number of images in a batch.
        max_wait_s: longest time in seconds that a batch waits for images that are being decoded.
        max_in_flight: largest number of images that are being decoded, wait or run.
        share: image → the share of a batch that it fills by the time that its answer takes. Beside the
            oldest image, shares sum up to 1 at most.
        observe: called with the size of each batch, in its thread.

    Example:
        >>> import asyncio, torch
        >>> async def decode():
        ...     return [torch.tensor(1), torch.tensor(2)]
        >>> async def main():
        ...     run = lambda images: [int(image) for image in images]
        ...     with Batcher(run, threads=1, max_batch=8, max_wait_s=0.0, max_in_flight=16) as batcher:
        ...         return await batcher.answers(2, decode)
        >>> asyncio.run(main())
        [1, 2]
    """

    def __init__(
        self,
        run: Callable[[Sequence[Image]], Iterable[T]],
        *,
        threads: int,
        max_batch: int,
        max_wait_s: float,
        max_in_flight: int,
        share: Callable[[Image], float] = lambda image: 0.0,
        observe: Callable[[int], object] = lambda size: None,
    ) -> None:
        self._run = run
        self._max_batch = max_batch
        self._max_wait_s = max_wait_s
        self._max_in_flight = max_in_flight
        self._share = share
        self._observe = observe
        self._changed = threading.Condition()  # guards the queue, the count of images in decoding, and closed
        self._queue: deque[_QueuedImage[Image, T]] = deque()  # the oldest first
        self._in_decoding = 0
        self._closed = False
        self.in_flight = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"network {number}", daemon=True)
            for number in range(threads)
        ]

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    @property
    def alive(self) -> bool:
        """Whether all threads run."""
        return all(thread.is_alive() for thread in self._threads)

    async def answers(self, images: int, decode: Callable[[], Awaitable[Sequence[Image]]]) -> list[T]:
        """Decode images, and run each in the next batch that has room.

        Args:
            images: number of images.
            decode: returns what `run` accepts of each; not called if there are too many images in flight.

        Raises:
            FullError: there would be more than `max_in_flight` images in flight.
            Exception: what `decode` or `run` raised.
        """
        if self.in_flight + images > self._max_in_flight:
            raise FullError
        self.in_flight += images
        queued: list[_QueuedImage[Image, T]] = []
        try:
            with self._count_as_decoding(images):
                for image in await decode():
                    queued.append(_QueuedImage(image, self._share(image), self._loop.create_future()))
                with self._changed:
                    self._queue.extend(queued)
            return list(await asyncio.gather(*(waiting.answer for waiting in queued)))
        finally:
            self.in_flight -= images
            for waiting in queued:
                waiting.answer.cancel()  # has an effect only if the request was cancelled

    @contextmanager
    def _count_as_decoding(self, images: int) -> Iterator[None]:
        with self._changed:
            self._in_decoding += images
        try:
            yield
        finally:
            with self._changed:
                self._in_decoding -= images
                self._changed.notify_all()

    def _work(self) -> None:
        while batch := self._next_batch():
            self._observe(len(batch))
            try:
                answers = self._run([queued.image for queued in batch])
                if isinstance(answers, Sequence):  # there all at once: the event loop is woken once
                    self._loop.call_soon_threadsafe(_set_answers, batch, answers)
                else:
                    for queued, answer in zip(batch, answers, strict=True):
                        self._loop.call_soon_threadsafe(_set_answers, [queued], [answer])
            except Exception as error:  # of any kind: the next batch must be answered all the same
                self._loop.call_soon_threadsafe(_set_error, batch, error)

    def _next_batch(self) -> list[_QueuedImage[Image, T]]:
        """Wait for the next batch; return an empty one once the batcher is closed and the queue is empty."""
        with self._changed:
            while self._changed.wait_for(lambda: self._queue or self._closed) and self._queue:
                self._changed.wait_for(
                    lambda: not self._in_decoding or len(self._queue) >= self._max_batch, self._max_wait_s
                )
                if batch := self._take_batch():
                    return sorted(batch, key=lambda queued: queued.share)
        return []

    def _take_batch(self) -> list[_QueuedImage[Image, T]]:
        """Take the oldest image that is still wanted from the queue, and the others that fit beside it."""
        wanted = [queued for queued in self._queue if not queued.answer.cancelled()]
        batch = wanted[:1]
        filled = 0.0  # by those beside the oldest
        for queued in sorted(wanted[1:], key=lambda queued: queued.share):
            filled += queued.share
            if len(batch) == self._max_batch or filled > 1:
                break
            batch.append(queued)
        taken = set(batch)
        self._queue.clear()
        self._queue.extend(queued for queued in wanted if queued not in taken)
        return batch


def _set_answers(batch: Sequence[_QueuedImage[Image, T]], answers: Sequence[T]) -> None:
    for image, answer in zip(batch, answers, strict=True):
        if not image.answer.done():
            image.answer.set_result(answer)


def _set_error(batch: Sequence[_QueuedImage[Image, T]], error: Exception) -> None:
    for image in batch:
        if not image.answer.done():
            image.answer.set_exception(error)
