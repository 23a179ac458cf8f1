from pathlib import Path

import pytest

from netfission.runs.folder import RunFolder
from netfission.utils.outputs import ENVIRONMENT_MARK, RUN_FILES, check_out, check_out_folder


def test_every_file_that_a_run_has_for_itself_is_known() -> None:
    folder = RunFolder(Path("run"))
    paths = [
        getattr(folder, name) for name in dir(RunFolder) if isinstance(getattr(RunFolder, name), property)
    ]
    files = {path.name for path in paths if isinstance(path, Path) and path.parent == folder.path}
    made_anew = {"README.md", "report.html"}
    assert files - RUN_FILES == {".lock", "evaluations", "tensorboard"} | made_anew
    assert files >= RUN_FILES


def test_a_file_of_a_run_is_no_output_of_another_command(tmp_path: Path) -> None:
    check_out("--out", tmp_path / "config.json")  # of something else than a run
    (tmp_path / "config.yaml").write_text(f"{ENVIRONMENT_MARK}\n")
    check_out("--out", tmp_path / "cost.json")
    with pytest.raises(
        ValueError, match=r"^--out must be another file than a run's own, got .*config\.json$"
    ):
        check_out("--out", tmp_path / "config.json")


def test_several_files_replace_none_but_those_of_earlier_output(tmp_path: Path) -> None:
    folder, page = tmp_path / "page", tmp_path / "page.html"

    def check() -> None:
        check_out_folder("--out", folder, names=r".+\.svg", mark=page)

    check()  # nothing is there
    (folder / "run-a").mkdir(parents=True)
    (folder / ".cost.svg.12@host-0123abcd.tmp").touch()  # a killed process left it
    check()
    (folder / "run-a" / "cost.svg").touch()
    with pytest.raises(
        ValueError, match=r"^--out must be where a folder is new, .* got .*page with run-a/cost"
    ):
        check()
    page.touch()
    check()
    (folder / "cat.jpg").touch()
    with pytest.raises(ValueError, match=r"got .*page with cat\.jpg$"):
        check()
    with pytest.raises(ValueError, match=r"got .*page\.html, a file$"):
        check_out_folder("--out", page, names="", mark=page)
