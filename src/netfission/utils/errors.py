"""Errors for users, all by one template: the argument, what is valid, what came, and what to do."""

from collections.abc import Iterable
from math import isfinite
from numbers import Real
from typing import TYPE_CHECKING, Any

from netfission.utils.text import printable

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_IMAGE = 2**14  # pixels of a side, of images that others are resized to
MOST_THREADS = 1024  # of a CPU: PyTorch starts them all at once
MOST_ROUNDS = 1_000_000  # of timing
MOST_SEEDS = 10_000  # of a comparison
_LARGEST = 2**31 - 1  # integer
_LONGEST = 60  # characters of a value that a message repeats
_LONGEST_LINE = 300  # of another library's message


def invalid(argument: str, expected: str, got: Any = None, *, found: str = "", hint: str = "") -> ValueError:
    """Make the error for an argument that is not valid.

    Args:
        argument: name of the argument, setting, option or file.
        expected: what is valid, as it follows "must be".
        got: the value that came; its `repr` is shown, shortened to 60 characters.
        found: what came, in words, instead of `got`.
        hint: what to do about it; stands after a semicolon.

    Returns:
        The error, to be raised; its message is one line, with escapes for characters that control a terminal.

    Example:
        >>> print(invalid("exits", "a positive integer", 0))
        exits must be a positive integer, got 0
        >>> print(invalid("images", "finite", found="3 NaN values", hint="check the data set"))
        images must be finite, got 3 NaN values; check the data set
    """
    came = found or shortened(repr(got))
    message = f"{argument} must be {expected}, got {came}" + (f"; {hint}" if hint else "")
    return ValueError(printable(" ".join(message.split())))


def within(where: str, error: ValueError) -> ValueError:
    """Make the error again with the place where the argument stands before its message.

    Example:
        >>> print(within("contender single", invalid("exits", "a positive integer", 0)))
        contender single: exits must be a positive integer, got 0
    """
    return ValueError(f"{where}: {error}")


def shortened(text: str, longest: int = _LONGEST) -> str:
    """Cut text that is longer than `longest` characters, and mark the cut with an ellipsis.

    Example:
        >>> shortened("abcdef", 4)
        'abc…'
    """
    return text if len(text) <= longest else text[: longest - 1] + "…"


def describe(tensor: "Tensor") -> str:
    """Name the dtype and shape of a tensor, as an error message's `found`.

    Example:
        >>> import torch
        >>> describe(torch.zeros(2, 3))
        'float32 of shape (2, 3)'
    """
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def check_finite(argument: str, tensor: "Tensor", rows: str = "images") -> None:
    """Check that a tensor holds neither NaN nor infinity.

    Args:
        argument: its name.
        tensor: of one row or more.
        rows: what its rows are of, in the plural, for the message.

    Raises:
        ValueError: it does.

    Example:
        >>> import torch
        >>> check_finite("outputs", torch.tensor([[1.0, 2.0], [float("nan"), 3.0]]))
        Traceback (most recent call last):
        ValueError: outputs must be finite, got NaN or infinity in 1 of 2 images
    """
    import torch  # here, as most errors need none of it

    if torch.compiler.is_compiling():  # as for a file: its graph has no errors
        return
    broken = ~tensor.isfinite().flatten(1).all(dim=1)
    if broken.any():
        found = f"NaN or infinity in {int(broken.sum())} of {len(broken)} {rows}"
        raise invalid(argument, "finite", found=found)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has no message.

    What is longer than 300 characters is cut, as PyTorch names every weight that does not fit.

    Example:
        >>> first_line(RuntimeError("out of memory\\ntry less")), first_line(KeyError())
        ('out of memory', 'KeyError')
    """
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # as of a KeyError whose key cannot be printed
        lines = []
    return shortened(lines[0], _LONGEST_LINE) if lines else type(error).__name__


def check_choice(argument: str, value: str, known: Iterable[str]) -> str:
    """Return `value` if it is among `known`.

    Args:
        argument: name of the argument, for the message.
        value: what was given.
        known: the valid names.

    Raises:
        ValueError: it is not among them; the message names the closest valid names, or the first 20.

    Example:
        >>> check_choice("criterion", "snip", ["erk", "snip"])
        'snip'
        >>> check_choice("criterion", "snap", ["erk", "snip"])
        Traceback (most recent call last):
        ValueError: criterion must be one of erk, snip, got 'snap'; did you mean snip?
    """
    names = list(known)
    if value in names:
        return value
    listed = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    raise invalid(argument, f"one of {listed}", value, hint=did_you_mean(value, names))


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """Return the hint that names up to three known names close to `value`; empty if there are none.

    Example:
        >>> did_you_mean("snap", ["erk", "snip"])
        'did you mean snip?'
    """
    from difflib import get_close_matches  # not where nothing is wrong, as each command starts

    close = get_close_matches(str(value), known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else ""


def check_positive_integer(argument: str, value: Any, most: int = _LARGEST) -> int:
    """Return `value` if it is an integer of at least 1, and of at most `most`; default 2³¹ − 1.

    Raises:
        ValueError: it is not.

    Example:
        >>> check_positive_integer("exits", 3)
        3
        >>> check_positive_integer("exits", 0)
        Traceback (most recent call last):
        ValueError: exits must be a positive integer, got 0
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise invalid(argument, "a positive integer", value)
    if value > most:
        raise invalid(argument, f"an integer from 1 to {most:,}", value)
    return value


def check_image_size(argument: str, value: Any) -> int:
    """Return `value` if it is a side of images in pixels, an integer from 1 to `LARGEST_IMAGE`.

    Raises:
        ValueError: it is not.

    Example:
        >>> check_image_size("image_size", 2_000_000)
        Traceback (most recent call last):
        ValueError: image_size must be at most 16,384 pixels, got 2000000
    """
    side = check_positive_integer(argument, value)
    if side > LARGEST_IMAGE:
        raise invalid(argument, f"at most {LARGEST_IMAGE:,} pixels", side)
    return side


def check_share(argument: str, value: float, kind: str = "a probability") -> float:
    """Return `value` if it is a number above 0 and below 1.

    Args:
        argument: its name.
        value: the number.
        kind: what it is, for the message.

    Raises:
        ValueError: it is not.

    Example:
        >>> check_share("delta", 1.0)
        Traceback (most recent call last):
        ValueError: delta must be a probability above 0 and below 1, got 1.0
    """
    if not isinstance(value, Real) or not 0 < value < 1:
        raise invalid(argument, f"{kind} above 0 and below 1", value)
    return value


def check_within(argument: str, value: float, least: float, most: float) -> float:
    """Return `value` if it is a number from `least` to `most`.

    Raises:
        ValueError: it is not.

    Example:
        >>> check_within("mix_alpha", 0.0, 0.1, 1000)
        Traceback (most recent call last):
        ValueError: mix_alpha must be a number from 0.1 to 1000, got 0.0
    """
    if not isinstance(value, Real) or not least <= value <= most:
        raise invalid(argument, f"a number from {least:g} to {most:g}", value)
    return value


def check_positive(argument: str, value: float) -> float:
    """Return `value` if it is a finite number above 0.

    Raises:
        ValueError: it is not.

    Example:
        >>> check_positive("temperature", 0.0)
        Traceback (most recent call last):
        ValueError: temperature must be a positive number, got 0.0
    """
    if not isinstance(value, Real) or not isfinite(value) or value <= 0:
        raise invalid(argument, "a positive number", value)
    return value
