import asyncio
import threading
import time

import pytest
import torch

from netfission.serve.batching import Batcher, FullError


def batcher(run=lambda images: [int(image) for image in images], **settings):
    defaults = {"threads": 1, "max_batch": 4, "max_wait_s": 0.0, "max_in_flight": 1000}
    return Batcher(run, **(defaults | settings))


def ready(*numbers):
    """A decoder of images that need none."""

    async def decode():
        return [torch.tensor(number) for number in numbers]

    return len(numbers), decode


@pytest.mark.parametrize("threads", [1, 3])
def test_each_request_gets_its_own_answers_in_batches_that_are_not_too_large(threads):
    sizes, all_came = [], threading.Event()

    def run(images):
        all_came.wait(60)
        return [int(image) for image in images]

    async def main():
        with batcher(run, threads=threads, observe=sizes.append) as own:
            requests = [range(start, start + start % 3 + 1) for start in range(0, 200, 3)]
            asked = [asyncio.create_task(own.answers(*ready(*numbers))) for numbers in requests]
            await asyncio.sleep(0)  # all of them are begun
            all_came.set()
            return requests, await asyncio.gather(*asked)

    requests, answers = asyncio.run(main())
    assert answers == [list(numbers) for numbers in requests]
    assert max(sizes) == 4
    assert sum(sizes) == sum(map(len, requests))


def test_images_gather_while_a_batch_runs():
    sizes, gate = [], threading.Event()

    def run(images):
        gate.wait(10)
        return images

    async def main():
        with batcher(run, observe=sizes.append) as own:
            first = asyncio.create_task(own.answers(*ready(0)))
            while not sizes:
                await asyncio.sleep(0.001)
            others = [asyncio.create_task(own.answers(*ready(number))) for number in range(4)]
            await asyncio.sleep(0.01)
            gate.set()
            await asyncio.gather(first, *others)

    asyncio.run(main())
    assert sizes == [1, 4]


def test_a_batch_waits_for_what_is_being_decoded_and_for_nothing_else():
    sizes, decoded = [], asyncio.Event()

    async def later():
        await decoded.wait()
        return [torch.tensor(2)]

    async def main():
        with batcher(max_wait_s=30.0, observe=sizes.append) as own:
            start = time.monotonic()
            await own.answers(*ready(0))
            assert time.monotonic() - start < 15  # alone, it does not wait
            coming = asyncio.create_task(own.answers(1, later))
            await asyncio.sleep(0)
            waiting = asyncio.create_task(own.answers(*ready(1)))
            await asyncio.sleep(0.05)
            decoded.set()
            return await coming, await waiting

    assert asyncio.run(main()) == ([2], [1])
    assert sizes == [1, 2]


def test_a_batch_waits_no_longer_than_it_may():
    async def never():
        await asyncio.sleep(3600)

    async def main():
        with batcher(max_wait_s=0.01) as own:
            coming = asyncio.create_task(own.answers(1, never))
            await asyncio.sleep(0)
            assert await asyncio.wait_for(own.answers(*ready(1)), 30) == [1]
            coming.cancel()

    asyncio.run(main())


def test_what_there_is_no_room_for_is_refused_and_room_is_given_back():
    async def broken():
        raise ValueError("broken")

    async def main():
        with batcher(max_in_flight=2) as own:
            with pytest.raises(FullError):
                await own.answers(*ready(1, 2, 3))
            for _ in range(3):
                with pytest.raises(ValueError, match="broken"):
                    await own.answers(2, broken)
            assert own.in_flight == 0
            assert await own.answers(*ready(1, 2)) == [1, 2]

    asyncio.run(main())


def test_what_takes_little_time_is_answered_before_what_came_earlier_and_takes_long():
    batches, gate, small_came = [], threading.Event(), threading.Event()

    def run(images):
        gate.wait(10)
        batches.append([int(image) for image in images])
        for image in images:
            if image >= 99 and not small_came.wait(10):
                raise TimeoutError
            yield int(image)

    async def main():
        with batcher(run, share=lambda image: int(image) / 100) as own:
            first = asyncio.create_task(own.answers(*ready(0)))
            await asyncio.sleep(0.01)  # it runs
            large = asyncio.create_task(own.answers(*ready(400, 300, 99, 99)))
            await asyncio.sleep(0)
            small = asyncio.create_task(own.answers(*ready(2, 1)))
            await asyncio.sleep(0)
            gate.set()
            assert await small == [2, 1]
            small_came.set()
            assert await first == [0] and await large == [400, 300, 99, 99]

    asyncio.run(main())
    # Beside the oldest, 100 at most together: the smallest of them: 99 and 300 wait for their turn.
    assert batches == [[0], [1, 2, 400], [99, 300], [99]]


def test_a_batch_that_fails_fails_alone():
    def run(images):
        if images[0] == 13:
            raise RuntimeError("out of memory")
        return images

    async def main():
        with batcher(run, max_batch=1) as own:
            answers = await asyncio.gather(
                *(own.answers(*ready(number)) for number in (12, 13, 14)), return_exceptions=True
            )
            assert own.alive
            return answers

    first, second, third = asyncio.run(main())
    assert (first, third) == ([12], [14])
    assert isinstance(second, RuntimeError)


def test_what_was_given_up_is_not_run():
    ran, gate = [], threading.Event()

    def run(images):
        gate.wait(10)
        ran.extend(int(image) for image in images)
        return images

    async def main():
        with batcher(run, max_batch=1) as own:
            first = asyncio.create_task(own.answers(*ready(0)))
            await asyncio.sleep(0.01)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(own.answers(*ready(1)), 0.01)
            gate.set()
            await first
            await own.answers(*ready(2))

    asyncio.run(main())
    assert ran == [0, 2]
