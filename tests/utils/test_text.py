from netfission.utils.text import align_columns, count_noun, percent, printable, rounded, unsaturated


def test_columns_are_aligned_and_lines_end_without_blanks():
    rows = [["network", "MACs", "ms"], ["single", "1,200", "3"], ["cut short"]]
    assert align_columns(rows) == "network     MACs  ms\nsingle     1,200   3\ncut short"


def test_what_controls_a_terminal_is_escaped():
    assert printable("café 猫.png") == "café 猫.png"
    assert printable("a\nb\x1b[2J\u202e\udcff\u2028") == r"a\nb\x1b[2J\u202e\udcff\u2028"


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
