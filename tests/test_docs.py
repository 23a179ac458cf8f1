"""The how-tos do what they say: their blocks are run in order, as a reader would."""

import re
import shlex
from pathlib import Path

import pytest

from netfission.cli import main

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
HOW_TOS = sorted((DOCS / "how-to").glob("*.md"))


@pytest.mark.parametrize("page", HOW_TOS, ids=[page.stem for page in HOW_TOS])
def test_a_how_to_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks
    names: dict[str, object] = {}  # of a page's Python, which is one program in pieces
    for language, text in blocks:
        if language == "python":
            exec(compile(text, page.name, "exec"), names)
            continue
        for command in text.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(command)
            assert program == "netfission"
            assert main(arguments) == 0, command


def test_every_page_is_listed_and_every_listed_page_is_there():
    listed = set(re.findall(r"[\w/-]+\.md", (DOCS.parent / "mkdocs.yml").read_text()))
    made = {"reference/commands.md"}  # by `make docs`
    assert listed - made == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} - made
