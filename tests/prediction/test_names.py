import codecs
import io
import os
import re
import sys

import pytest
from PIL import Image

from netfission.prediction.names import read_names

NAMES = ["a.jpg", "sub folder/é.png", "猫.webp"]


@pytest.mark.skipif(sys.getfilesystemencoding() != "utf-8", reason="names of files are not UTF-8 here")
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("last", [True, False])
def test_a_list_of_any_editor_is_read(encoding, line_end, last, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    text = line_end.join([NAMES[0], "", *NAMES[1:]]) + line_end * last
    assert read_names(mark + text.encode(encoding)) == NAMES


def test_names_are_bytes():
    odd = b"ros\xe9/\xff.jpg"
    assert [os.fsencode(name) for name in read_names(odd + b"\n")] == [odd]


def test_a_name_that_ends_in_a_carriage_return_stays_if_there_is_such_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png\r").touch()
    assert read_names(b"a.png\r\nb.png\r\n") == ["a.png\r", "b.png"]


def test_no_name():
    assert read_names(b"") == read_names(b"\r\n\n") == read_names(codecs.BOM_UTF8) == []


def image(kind):
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        *((image(kind), f"an image ({kind})") for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "an image (HEIC)"),
        (b"\x7fELF\0\0\0", "binary data"),
        (codecs.BOM_UTF16_LE + b"a", "binary data"),
    ],
)
def test_what_is_no_list_is_refused(content, found):
    message = f"images must be names of files on standard input, one per line, got {found}; pass "
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        read_names(content)
