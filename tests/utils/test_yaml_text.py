import pytest

from netfission.utils.yaml_text import parse_yaml, read_text

REPEATED = "- &a [x, x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"- &{name} [{', '.join([f'*{inner}'] * 10)}]" for inner, name in zip("abcde", "bcdef", strict=True)
)


def test_aliases_repeat_values_within_bounds():
    assert parse_yaml("[&a [1, 2], *a, *a]") == [[1, 2]] * 3
    with pytest.raises(ValueError, match=r"^YAML must be at most 100,000 values, got more, "):
        parse_yaml(REPEATED)  # a million from 300 bytes
    with pytest.raises(ValueError, match=r"^alias must be outside of what it names"):
        parse_yaml("title: &a [*a]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {b: 1, b: 2}", r"^b must be given once, got it twice$"),
        (
            "a: [",
            r"^text must be YAML, got while parsing a flow node expected the node content, but .*$",
        ),
        (
            "!!python/object/apply:os.system [ls]",
            r"^text must be YAML, got could not determine a constructor for the tag .*$",
        ),
        ("[" * 5000, r"^YAML must be nested less deeply, got too many levels$"),
        ("a: 2001-99-99", r"^month must be in 1\.\.12$"),
    ],
)
def test_what_is_no_yaml_is_said_in_one_line(text, message):
    with pytest.raises(ValueError, match=message):
        parse_yaml(text)


def test_a_text_without_content_is_none_and_one_without_end_is_refused(tmp_path):
    assert parse_yaml("# nothing") is None
    file = tmp_path / "a.yaml"
    file.write_bytes(b"a: " + b"b" * 2**20)
    with pytest.raises(ValueError, match=r"^it must be at most 1,048,576 bytes, got more$"):
        read_text(file)
