import re
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from PIL import Image

from netfission.cli import command_parser, main
from netfission.config import FINETUNE_RECIPE, RECIPES
from netfission.models import create_model
from netfission.runs.folder import RunFolder

DIGITS = "finetune digits --model wrn-10-1 --pretrained false --out run"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("finetune --model wrn-10-1", "^FOLDER must be given, got nothing; see netfission finetune --help$"),
        (
            "finetune nowhere --model wrn-10-1",
            "^data must be one of digits, .*, or a folder, got 'nowhere'",
        ),
        ("finetune ./nowhere --model wrn-10-1", "^data folder ./nowhere does not exist$"),
        (
            "finetune empty --model wrn-10-1 --pretrained false",
            "empty must be a folder of parquet files, or of images as CLASS/.* got no class folder$",
        ),
        (
            "finetune digits",
            "^--model must be given, got nothing; for example resnet18, see `netfission train",
        ),
        ("finetune digits --model wrn-10-x", "^--model must be .*, got 'wrn-10-x'; did you mean wrn-"),
        ("finetune digits --model wrn-10-1", "^--pretrained must be False for 'wrn-10-1', which has no publ"),
        (
            f"{DIGITS} --weights net.pt --pretrained true",
            "^--weights must be left out with pretrained, which",
        ),
        (
            "finetune digits --model wrn-10-1 --weights net.pt --out run",
            r"net\.pt must be weights of wrn-10-1, a classifier of other classes allowed, got .* missing \(",
        ),
        (
            f"{DIGITS} --finetuned net.pt",
            "^--pretrained must be left out with finetuned, got False; the single",
        ),
        ("finetune digits --finetuned none.pt", "^--model must be given, got nothing; for example resnet18"),
        (
            "finetune digits --model wrn-10-1 --finetuned none.pt --out run",
            r"none\.pt must be a file of weights \(safetensors, .*, got no such file or directory$",
        ),
        (
            f"{DIGITS} --validation 0",
            "^--validation must be above 0, as the networks are calibrated on valid",
        ),
        (
            f"{DIGITS} --branch-after [3,3]",
            "^--branch-after must be 2 stages, each a number from 1 to 2 or one",
        ),
        (
            f"{DIGITS} --linear-exits [4]",
            "^--linear-exits must be stages, each a number from 1 to 3 or one of",
        ),
        (
            f"{DIGITS} --exits 3 --stages [bn]",
            r"^--exits must be 1 for a network of one stage \(bn\), which no exit can",
        ),
        (
            f"{DIGITS.replace('digits', 'one')} --image-size 8",
            r"one must be a data set of at least 2 classes, got 1 \(cat\)$",
        ),
        (f"{DIGITS} --epochs 0", "^--epochs must be a positive integer, got 0$"),
        (f"{DIGITS} --ensemble-epochs 0", "^--ensemble-epochs must be a positive integer, got 0$"),
        (f"{DIGITS} --mix-alpha 1", "^--mix-alpha must be left out unless mix=cutmix or mix=mixup, got 1.0$"),
        (
            f"{DIGITS} --exits 1 --ratio [1]",
            r"^--ratio must be left out unless exits is 2 or more, got \[1.0\]",
        ),
        (f"{DIGITS} --recipe fast", "^--recipe must be one of finetune, finetune-short, got 'fast'$"),
        (
            f"{DIGITS} --mean [0.5,0.5,0.5]",
            r"^--mean must be a list of 1 number, one per channel of the images, got \[0\.5, 0",
        ),
        (f"{DIGITS} --devices 2", "^flag must be one that netfission finetune accepts, got '--devices'"),
    ],
)
def test_a_bad_request_ends_in_one_line_and_leaves_nothing(request_, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "one" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "cat" / "image.png")
    torch.save(create_model("cifar-resnet18-w16", 10, in_channels=1).state_dict(), "net.pt")
    assert main(request_.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error.removeprefix("netfission: ").rstrip("\n")), error
    assert not list(tmp_path.rglob("config.yaml"))


def test_the_help_shows_the_commands_own_defaults():
    text = " ".join(command_parser("finetune").format_help().split())
    for name in ("epochs", "optimizer", "learning_rate", "schedule"):
        flag = "--" + name.replace("_", "-")
        assert re.search(
            rf"{flag} \S+ [^()]*(\([^()]*\))?[^()]*\(default: {RECIPES[FINETUNE_RECIPE][name]}\)", text
        )
    assert "paths: weights, channels or copies (default: channels)" in text
    assert "(default: the last stage but one, for each)" in text
    assert "hub or a folder with config.json) --pretrained" in text  # no default
    assert "--task" in text and "--void" in text


def test_the_folder_is_named_by_data_and_model(tmp_path, monkeypatch):
    planned = []

    def plan(given, single, **_):
        planned.append(single.relative_to(Path.cwd()).as_posix())
        raise KeyboardInterrupt

    monkeypatch.setattr("netfission.runs.finetune_settings.plan_finetuning", plan)
    for flags in ("digits --model torchvision/resnet18 --seed 2", "digits --model wrn-10-1"):
        assert main(["finetune", *flags.split()]) == 130
    assert planned == [
        "runs/digits-torchvision-resnet18-finetuned-seed2/single",
        "runs/digits-wrn-10-1-finetuned-seed0/single",
    ]


@pytest.mark.parametrize(("now", "given"), [("old", None), ("new", "new")])
def test_the_report_reads_images_where_they_are_now(now, given, tmp_path, monkeypatch):
    def finetune(plan, out, **_):
        if not out.exists():
            RunFolder(out).claim(plan.ensemble, resume=False)
        return namedtuple("Gain", "table summary")(str, str)

    pages = []
    monkeypatch.setattr("netfission.runs.finetune.finetune", finetune)
    monkeypatch.setattr("netfission.report.write_report", lambda *_, data=None: pages.append(data))
    for name in ("old", now):
        for number in range(16):
            folder = tmp_path / name / ("cat", "dog")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), number).save(folder / f"{number}.png")
        place = str(tmp_path / name)
        flags = ["--model", "wrn-10-1", "--pretrained", "false", "--batch-size", "8"]
        assert main(["finetune", place, *flags, "--out", str(tmp_path / "run")]) == 0
    assert pages == [None, given and place]
