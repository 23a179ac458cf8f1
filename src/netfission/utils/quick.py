"""A quick start and end of a short command: without garbage collection, compiler and teardown."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NoReturn, TextIO

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


def lean_metrics() -> None:
    """Import torchmetrics, once it is needed, as if what its other metrics need were not installed.

    lightning imports it, and it imports transformers, torchvision, matplotlib and most of SciPy for metrics
    of text, images and audio, and for plots. That takes longer than all else that a training imports. Metrics
    that need one of these then ask to install it: only a process that uses none may call this.

    Example:
        >>> lean_metrics()
    """
    if "torchmetrics" not in sys.modules and _LeanMetrics not in sys.meta_path:
        sys.meta_path.insert(0, _LeanMetrics)


class _LeanMetrics:
    """Finds torchmetrics, once, before Python's own finders do."""

    @classmethod
    def find_spec(cls, name: str, *_: object) -> ModuleSpec | None:
        if name != "torchmetrics":
            return None
        sys.meta_path.remove(cls)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_lean(module: ModuleType) -> None:
            with _without_packages():
                execute(module)

        spec.loader.exec_module = execute_lean  # type: ignore[method-assign]
        return spec


@contextmanager
def _without_packages() -> Iterator[None]:
    """Within, lightning's checks of what is installed, which torchmetrics makes, deny some packages."""
    from lightning_utilities.core import imports

    is_there, requirement = imports.package_available, imports.RequirementCache
    check = getattr(requirement, "_check_requirement", None)
    if check is None:  # another version, which checks in another way
        yield
        return

    def check_lean(self: Any) -> None:
        if (self.requirement or "").startswith(_OTHERS):
            self.available, self.message = False, f"{self.requirement} is not used here"
        else:
            check(self)

    imports.package_available = lambda name: name not in _OTHERS and is_there(name)  # type: ignore[assignment]
    requirement._check_requirement = check_lean  # type: ignore[method-assign]
    try:
        yield
    finally:
        imports.package_available = is_there
        requirement._check_requirement = check  # type: ignore[method-assign]


_OTHERS = ("matplotlib", "scipy", "torchvision", "transformers")


def end_process(status: int) -> NoReturn:
    """End the process at once: teardown takes a second after PyTorch and timm were imported.

    Args:
        status: the exit status; 1 in place of 0 if standard output cannot be written whole.
    """
    if (error := _flush(sys.stdout)) and status == 0:
        status = 1
        if sys.stderr is not None:
            with suppress(OSError):
                print(f"netfission: standard output cannot be written ({error})", file=sys.stderr)
    _flush(sys.stderr)
    os._exit(status)


def _flush(stream: TextIO | None) -> str:
    """Write what a stream holds; return why that is not possible, or an empty text."""
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError) as error:  # it is full, or closed
        return getattr(error, "strerror", None) or str(error)
    return ""
