"""The how-tos do what they say: their blocks are run in order, as a reader would."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
HOW_TOS = sorted((DOCS / "how-to").glob("*.md"))


@pytest.mark.parametrize("page", HOW_TOS, ids=[page.stem for page in HOW_TOS])
def test_a_how_to_runs(page, tmp_path):
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    own = [text for language, text in blocks if language == "python"]
    for number, (language, text) in enumerate(blocks):
        if language == "python" and page.stem == "own-model":  # one program in pieces
            if text != own[-1]:
                continue
            text = "\n".join(own)
        command = ["bash", "-ec", text] if language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{page.name}, block {number + 1}:\n{text}\n{done.stderr}"


def test_every_page_is_listed_and_every_listed_page_is_there():
    listed = set(re.findall(r"[\w/-]+\.md", (DOCS.parent / "mkdocs.yml").read_text()))
    made = {"reference/commands.md"}  # by `make docs`
    assert listed - made == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} - made
