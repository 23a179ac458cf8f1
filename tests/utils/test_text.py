import io

import pytest

from netfission.utils.text import (
    accept_all_text,
    align_columns,
    as_text,
    count_noun,
    percent,
    printable,
    rounded,
    unsaturated,
)


def test_columns_are_aligned_and_lines_end_without_blanks():
    rows = [["network", "MACs", "ms"], ["single", "1,200", "3"], ["cut short"]]
    assert align_columns(rows) == "network     MACs  ms\nsingle     1,200   3\ncut short"


def test_cells_cannot_steer_the_terminal():
    table = align_columns([["number", "MAE"], ["\x1b[31mred\n", "1"]])
    assert table.splitlines() == ["number         MAE", r"\x1b[31mred\n    1"]


def test_what_controls_a_terminal_is_escaped():
    assert printable("café 猫.png") == "café 猫.png"
    assert printable("a\nb\x1b[2J\u202e\udcff\u2028") == r"a\nb\x1b[2J\u202e\xff\u2028"


def test_counted_nouns():
    assert [count_noun(n, "run") for n in (0, 1, 2, 1000)] == ["0 runs", "1 run", "2 runs", "1,000 runs"]


def test_rounding_never_reaches_an_end_that_a_number_does_not():
    shares = [0.0, 1e-12, 0.00004, 0.00006, 0.5, 0.99994, 0.99996, 1 - 1e-12, 1.0]
    assert list(map(percent, shares)) == [
        *("0.00", "< 0.01", "< 0.01", "0.01", "50.00", "99.99", "> 99.99", "> 99.99", "100.00")
    ]
    assert [percent(share, 1) for share in (0.9994, 0.9996)] == ["99.9", "> 99.9"]
    assert [percent(share, 0) for share in (0.004, 0.996)] == ["< 1", "> 99"]
    assert [rounded(nats, 3) for nats in (1e-5, 0.9999, 2.0)] == ["< 0.001", "1.000", "2.000"]
    assert [unsaturated(p) for p in (0.3, 0.99)] == [0.3, 0.99]
    assert 0 < unsaturated(0.0) < 1e-6 and 1 - 1e-6 < unsaturated(1.0) < 1


def test_names_become_text_whatever_the_locale():
    assert as_text("café 猫\t") == "café 猫\t"
    for encoding in ("utf-8", "ascii"):  # of file names, in the locale
        assert as_text(b"caf\xc3\xa9".decode(encoding, "surrogateescape")) == "café"
        assert as_text(b"caf\xe9".decode(encoding, "surrogateescape")) == r"caf\xe9"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape", "backslashreplace"])
def test_a_stream_writes_all_text(encoding, errors):
    text = "16.1 ± 0.3 × 2 – 猫 → ros\udce9 \ud800 █"
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
    accept_all_text(stream)
    stream.write(text)
    stream.flush()
    written = stream.buffer.getvalue().decode(encoding)
    expected = text.replace("\udce9", r"\xe9").replace("\ud800", r"\ud800")
    if encoding != "utf-8":
        expected = expected.replace("猫", r"\u732b").replace("→", "->").replace("█", r"\u2588")
    if encoding not in ("utf-8", "cp1252"):
        expected = expected.replace("–", "-")
    if encoding == "ascii":
        expected = expected.replace("±", "+-").replace("×", "x")
    assert written == expected


def test_what_a_user_chose_for_a_stream_stays():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    accept_all_text(stream)
    assert stream.errors == "replace"
    accept_all_text(None)
    accept_all_text(io.StringIO())
