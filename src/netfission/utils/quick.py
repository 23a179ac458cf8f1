"""A quick start and end of a short command: without garbage collection, compiler and teardown."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

_UTILS = "torch._dynamo.utils"


@contextmanager
def without_collection() -> Iterator[None]:
    """Collect no garbage within: imports make many objects that stay, and are searched again and again.

    Example:
        >>> with without_collection():
        ...     gc.isenabled()
        False
        >>> gc.isenabled()
        True
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def without_compiler() -> Iterator[None]:
    """Import packages within without PyTorch's compiler; what they define must not be compiled later.

    timm and torchvision mark functions that the compiler is to leave alone. That alone would import all of
    the compiler, which takes longer than both packages. Whatever else they read of it is the real thing.

    Example:
        >>> with without_compiler():
        ...     import torchvision
    """
    import torch

    disable = torch.compiler.disable
    torch.compiler.disable = _leave  # type: ignore[assignment]
    sys.modules.setdefault(_UTILS, _Utils(_UTILS))
    try:
        yield
    finally:
        torch.compiler.disable = disable
        _Utils.remove()


def _leave(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Callable[..., Any]:
    """Return the function as it is, or a decorator that does so."""
    return (lambda decorated: decorated) if function is None else function


class _Utils(ModuleType):
    """Stands for a module of the compiler until more of it is read than a function to call later."""

    @classmethod
    def remove(cls) -> None:
        if isinstance(sys.modules.get(_UTILS), cls):
            del sys.modules[_UTILS]

    @classmethod
    def is_compile_supported(cls, device: str) -> bool:
        """Ask the compiler, which is imported now."""
        cls.remove()
        supported: bool = import_module(_UTILS).is_compile_supported(device)
        return supported

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by Python's imports
            raise AttributeError(name)
        self.remove()
        return getattr(import_module(_UTILS), name)


def end_process(status: int) -> NoReturn:
    """End the process at once: teardown takes a second after PyTorch and timm were imported."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(status)
