"""Images of many requests, gathered into batches for one network."""

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

from torch import Tensor

T = TypeVar("T")


class FullError(Exception):
    """As many images as may be are under way already."""


@dataclass(frozen=True, eq=False)
class _Waiting(Generic[T]):
    pixels: Tensor
    answer: asyncio.Future[T]


class Batcher(Generic[T]):
    """Runs a network in threads of its own, on as many images at once as there are.

    While batches run, images gather for the next one. A batch that could hold more waits for images that
    are being decoded and for no others, so that a lone request never waits.

    A context manager, to be used in one event loop alone. At its end what is under way is answered first.

    Args:
        run: images → one answer for each; called in the threads.
        threads: how many; as many batches run at once.
        max_batch: images in a batch, at most.
        max_wait_s: seconds that a batch waits for images that are being decoded, at most.
        max_under_way: images that are being decoded, wait or run, at most.
        observe: told the size of each batch, in its thread.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Tensor]], Sequence[T]],
        *,
        threads: int,
        max_batch: int,
        max_wait_s: float,
        max_under_way: int,
        observe: Callable[[int], object] = lambda size: None,
    ) -> None:
        self._run = run
        self._max_batch = max_batch
        self._max_wait_s = max_wait_s
        self._max_under_way = max_under_way
        self._observe = observe
        self._changed = threading.Condition()  # guards what follows
        self._waiting: deque[_Waiting[T]] = deque()  # the oldest first
        self._coming = 0
        self._closed = False
        self.under_way = 0
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

    async def answers(self, images: int, decode: Callable[[], Awaitable[Sequence[Tensor]]]) -> list[T]:
        """Decode images and run each in whichever batch it comes into.

        Args:
            images: how many there are.
            decode: gives them; not called where there is no room.

        Raises:
            FullError: there is no room for as many.
            Exception: what `decode` or `run` raised.
        """
        if self.under_way + images > self._max_under_way:
            raise FullError
        self.under_way += images
        waiting: list[_Waiting[T]] = []
        try:
            with self._announced(images):
                for pixels in await decode():
                    waiting.append(_Waiting(pixels, self._loop.create_future()))
                self._waiting.extend(waiting)
            return list(await asyncio.gather(*(one.answer for one in waiting)))
        finally:
            self.under_way -= images
            for one in waiting:
                one.answer.cancel()  # does nothing but where the request was given up

    @contextmanager
    def _announced(self, images: int) -> Iterator[None]:
        with self._changed:
            self._coming += images
        try:
            yield
        finally:
            with self._changed:
                self._coming -= images
                self._changed.notify_all()

    def _work(self) -> None:
        while batch := self._gathered():
            self._observe(len(batch))
            try:
                answers = self._run([one.pixels for one in batch])
            except Exception as error:  # of any kind: the next batch must be answered all the same
                self._loop.call_soon_threadsafe(_fail, batch, error)
            else:
                self._loop.call_soon_threadsafe(_settle, batch, answers)

    def _gathered(self) -> list[_Waiting[T]]:
        """The next batch; empty once all is answered and closed."""
        with self._changed:
            while self._changed.wait_for(lambda: self._waiting or self._closed) and self._waiting:
                self._changed.wait_for(
                    lambda: not self._coming or len(self._waiting) >= self._max_batch, self._max_wait_s
                )
                size = min(self._max_batch, len(self._waiting))
                batch = [self._waiting.popleft() for _ in range(size)]
                if live := [one for one in batch if not one.answer.cancelled()]:
                    return live
        return []


def _settle(batch: Sequence[_Waiting[T]], answers: Sequence[T]) -> None:
    for one, answer in zip(batch, answers, strict=True):
        if not one.answer.done():
            one.answer.set_result(answer)


def _fail(batch: Sequence[_Waiting[T]], error: Exception) -> None:
    for one in batch:
        if not one.answer.done():
            one.answer.set_exception(error)
