from netfission.utils.text import align_columns, count_noun, printable


def test_columns_are_aligned_and_lines_end_without_blanks():
    rows = [["network", "MACs", "ms"], ["single", "1,200", "3"], ["cut short"]]
    assert align_columns(rows) == "network     MACs  ms\nsingle     1,200   3\ncut short"


def test_what_controls_a_terminal_is_escaped():
    assert printable("café 猫.png") == "café 猫.png"
    assert printable("a\nb\x1b[2J\u202e\udcff\u2028") == r"a\nb\x1b[2J\u202e\udcff\u2028"


def test_counted_nouns():
    assert [count_noun(n, "run") for n in (0, 1, 2, 1000)] == ["0 runs", "1 run", "2 runs", "1,000 runs"]
