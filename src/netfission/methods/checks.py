"""Checks that several methods make, with one wording of their errors."""

from typing import Any

from netfission.utils.errors import invalid


def check_several_exits(exits: int, method: str) -> None:
    """Check that a method gets two exits (or members) or more.

    Raises:
        ValueError: it gets fewer.

    Example:
        >>> check_several_exits(1, "packed")
        Traceback (most recent call last):
        ValueError: exits must be at least 2 with method=packed, got 1
    """
    if exits < 2:
        raise invalid("exits", f"at least 2 with method={method}", exits)


def check_unused(setting: str, value: Any, expected: Any, method: str, hint: str = "") -> None:
    """Check that a setting which a method cannot use has the value that leaves it unused.

    Args:
        setting: name of the setting.
        value: what was given.
        expected: the only value that is valid.
        method: name of the method.
        hint: why, for the message.

    Raises:
        ValueError: `value` is another.

    Example:
        >>> check_unused("ema", 0.9, None, "snapshot", "it would average the snapshots")
        Traceback (most recent call last):
        ValueError: ema must be left out with method=snapshot, got 0.9; it would average the snapshots
    """
    if value != expected:
        valid = "left out" if expected is None else repr(expected)
        raise invalid(setting, f"{valid} with method={method}", value, hint=hint)


def unsuitable_model(method: str, expected: str, found: str, hint: str = "") -> ValueError:
    """Make the error for a model that a method cannot use.

    Args:
        method: name of the method.
        expected: which models it can use, as it follows "must be".
        found: what it found in the model.
        hint: what to do, where that helps.

    Example:
        >>> print(unsuitable_model("packed", "made of plain layers", "layer 'stem' (GroupNorm)"))
        model with method=packed must be made of plain layers, got layer 'stem' (GroupNorm)
    """
    return invalid(f"model with method={method}", expected, found=found, hint=hint)
