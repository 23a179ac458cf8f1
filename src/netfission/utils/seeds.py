"""Seeds of PyTorch's global generators, for code that draws from them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_CPU = torch.device("cpu")


@contextmanager
def seeded(seed: int, device: torch.device = _CPU) -> Iterator[None]:
    """Seed the global generators of the CPU and of `device`, and restore them at the end.

    `torch.manual_seed` would also seed all other devices, which nothing restores.

    Example:
        >>> with seeded(0):
        ...     first = torch.rand(1)
        >>> with seeded(0):
        ...     torch.equal(torch.rand(1), first)
        True
    """
    accelerators = [] if device.type in ("cpu", "meta") else [device]
    kind = device.type if accelerators else "cuda"
    with torch.random.fork_rng(accelerators, device_type=kind):
        torch.default_generator.manual_seed(seed)
        for accelerator in accelerators:
            state = torch.Generator(accelerator).manual_seed(seed).get_state()
            torch.get_device_module(accelerator).set_rng_state(state, accelerator)
        yield
