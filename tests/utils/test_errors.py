import math

import pytest
import torch

from netfission.utils.errors import (
    check_choice,
    check_positive,
    check_positive_integer,
    describe,
    first_line,
    invalid,
    shortened,
)


def test_the_template():
    assert str(invalid("exits", "a positive integer", 0)) == "exits must be a positive integer, got 0"
    assert str(invalid("flip", "true or false", None)) == "flip must be true or false, got None"
    with_hint = invalid("labels", "finite", found="2 NaN values", hint="check the data set")
    assert str(with_hint) == "labels must be finite, got 2 NaN values; check the data set"


def test_a_message_is_one_line_and_repeats_no_more_than_60_characters_of_a_value():
    message = str(invalid("name", "short", "x" * 1000))
    assert message == "name must be short, got '" + "x" * 58 + "…"
    assert str(invalid("file", "text", found="two\nlines")) == "file must be text, got two lines"
    assert shortened("abc", 3) == "abc"


def test_choices_name_the_nearest_and_at_most_20_names():
    assert check_choice("grouping", "copies", ("channels", "copies")) == "copies"
    with pytest.raises(ValueError, match=r"^grouping must be one of channels, copies, got 'zzz'$"):
        check_choice("grouping", "zzz", ("channels", "copies"))
    with pytest.raises(ValueError, match=r"got 'channel'; did you mean channels\?$"):
        check_choice("grouping", "channel", ("channels", "copies"))
    with pytest.raises(ValueError, match=r"one of 0, .*, 19, …, got '-'$"):
        check_choice("number", "-", map(str, range(21)))


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1", None])
def test_positive_integers(value):
    assert check_positive_integer("rounds", 1) == 1
    with pytest.raises(ValueError, match=r"^rounds must be a positive integer, got "):
        check_positive_integer("rounds", value)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_positive_numbers(value):
    assert check_positive("rate", 1e-9) == 1e-9
    with pytest.raises(ValueError, match=r"^rate must be a positive number, got "):
        check_positive("rate", value)


def test_tensors_and_errors_in_words():
    assert describe(torch.zeros(0, 3, dtype=torch.int64)) == "int64 of shape (0, 3)"
    assert first_line(RuntimeError("\nfirst\nsecond")) == "first"
    assert first_line(RuntimeError("key, " * 1000)) == ("key, " * 60)[:299] + "…"
    assert first_line(AssertionError()) == "AssertionError"


def test_an_error_that_cannot_be_printed_is_named_by_its_type() -> None:
    class Endless:
        def __repr__(self) -> str:
            return repr(self)

    assert first_line(KeyError(Endless())) == "KeyError"
