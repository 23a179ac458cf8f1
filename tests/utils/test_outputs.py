from pathlib import Path

import pytest

from netfission.cli import main
from netfission.runs.folder import RunFolder
from netfission.utils.outputs import (
    ENVIRONMENT_MARK,
    RUN_FILES,
    check_comparison_folder,
    check_out,
    check_out_folder,
)

RESULTS = Path(__file__).parents[2] / "results"


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


def test_a_file_of_a_comparison_is_no_output_of_another_command(tmp_path: Path) -> None:
    kept = [path for path in (RESULTS / "figure3-laptop").iterdir() if path.is_file()]
    files = [tmp_path / path.name for path in kept]
    for file in files:
        check_out("--out", file)  # of something else than a comparison
    fill(tmp_path, "records/0123456789ab.json")
    check_out("--out", tmp_path / "predictions.csv")
    check_out("--out", tmp_path / "records" / "cost.json")
    for file in (*files, tmp_path / "records" / "0123456789ab.json"):
        with pytest.raises(ValueError, match=r"^--out must be another file than a comparison's own, got "):
            check_out("--out", file)


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


@pytest.mark.parametrize(
    "names",
    [
        (".hidden", ".costs.json.12@host-0123abcd.tmp"),
        ("locks/",),
        ("locks/0123456789ab.lock",),
        ("locks/", "runs/", "records/"),
        ("runs/0123456789ab/",),  # its locks were removed
        ("records/0123456789ab.json", "costs.json", "notes.txt"),
    ],
)
def test_a_comparison_goes_on_in_a_folder_that_one_has_left(names, tmp_path):
    fill(tmp_path, *names)
    check_comparison_folder("--out", tmp_path)


def test_a_comparison_goes_on_where_its_costs_alone_are_left(tmp_path):
    costs = RESULTS / "figure3-laptop" / "costs.json"
    (tmp_path / "costs.json").write_bytes(costs.read_bytes())
    check_comparison_folder("--out", tmp_path)


@pytest.mark.parametrize(
    ("names", "foreign"),
    [
        (("comparison.txt",), "comparison.txt"),
        (("locks/", "costs.json"), "costs.json"),
        (("cat/1.png", "dog/1.png"), "cat"),
        (("records/blues.jpg",), "records"),
        (("config.yaml", "metrics.csv"), "config.yaml"),
    ],
)
def test_a_comparison_is_not_written_into_a_folder_of_something_else(names, foreign, tmp_path, capsys):
    fill(tmp_path, *names)
    before = sorted(tmp_path.rglob("*"))
    for command in (["compare"], ["reproduce", "demo"], ["demo"]):
        assert main([*command, "--out", str(tmp_path)]) == 2
        expected = (
            "netfission: --out must be where a folder is new, empty or of earlier output of this command"
        )
        assert capsys.readouterr() == ("", f"{expected}, got {tmp_path} with {foreign}\n")
    assert sorted(tmp_path.rglob("*")) == before


def fill(folder: Path, *names: str) -> None:
    """Make folders, whose names end in a slash, and files."""
    for name in names:
        path = folder / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()
