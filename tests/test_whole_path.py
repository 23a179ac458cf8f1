"""From a folder of images to a user's hands: trained, asked, exported, run without us, reported, served."""

import csv
import http.client
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from netfission.cli import main

ROOT = Path(__file__).parents[1]
SHARED = ROOT / "../shared/data"


@pytest.fixture(
    scope="module",
    params=[
        "digits",
        pytest.param(
            str(SHARED / "cifar100"),
            marks=[
                pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is absent"),
                pytest.mark.thorough,
            ],
            id="cifar100",
        ),
    ],
)
def path(request, tmp_path_factory):
    """A folder of images of ten classes, and a run trained on it for a few epochs."""
    folder = tmp_path_factory.mktemp("path")
    script = [sys.executable, str(ROOT / "examples" / "write_image_folder.py"), request.param]
    subprocess.run([*script, str(folder / "images"), "--images", "20"], check=True, capture_output=True)
    flags = (
        "--model wrn-10-1 --exits 3 --branch_after [1,1] --grouping channels --epochs 2 --batch_size 32 "
        "--validation 0.2 --schedule one_cycle --flip false --accelerator cpu"
    )
    train = ["train", "--data", str(folder / "images"), *flags.split(), "--out", str(folder / "run")]
    assert main(train) == 0
    return folder


def test_every_figure_agrees(path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert main(["evaluate", str(path / "run")]) == 0
    evaluation = json.loads((path / "run" / "evaluation.json").read_text("utf-8"))
    reliability = json.loads((path / "run" / "reliability.json").read_text("utf-8"))

    answers = path / "answers.jsonl"
    asked = [
        "predict",
        str(path / "run"),
        str(path / "images" / "test"),
        "--probabilities",
        "--out",
        str(answers),
    ]
    assert main(asked) == 0
    predictions = [json.loads(line) for line in answers.read_text("utf-8").splitlines()]
    truth = [Path(each["image"]).parent.name for each in predictions]
    right = [each["class"] == name for each, name in zip(predictions, truth, strict=True)]
    assert sum(right) / len(right) == pytest.approx(evaluation["ensemble"]["top1"], abs=1e-6)
    nll = [-math.log(each["probabilities"][name]) for each, name in zip(predictions, truth, strict=True)]
    assert sum(nll) / len(nll) == pytest.approx(reliability["scaled"]["metrics"]["nll"], rel=1e-3)
    assert sum(each["disagreement"] for each in predictions) / len(predictions) == pytest.approx(
        evaluation["disagreement"], abs=1e-4
    )

    assert main(["export", str(path / "run"), "--out", str(path / "model.onnx")]) == 0
    images = [each["image"] for each in predictions[::37]]
    script = [sys.executable, str(ROOT / "examples" / "run_onnx.py"), str(path / "model.onnx"), *images]
    printed = subprocess.run(script, check=True, capture_output=True, text=True).stdout
    for each in predictions[::37]:
        line = next(line for line in printed.splitlines() if line.startswith(each["image"]))
        assert each["class"] in line
        shown = [float(number) for number in re.findall(r"\d+\.\d+", line.removeprefix(each["image"]))]
        assert any(
            abs(number - share) < 1e-3
            for number in shown
            for share in (each["probability"], 100 * each["probability"])
        )


def test_it_is_reported(path):
    assert main(["report", str(path / "run")]) == 0
    page = (path / "run" / "report.html").read_text("utf-8")
    top1 = json.loads((path / "run" / "evaluation.json").read_text("utf-8"))["ensemble"]["top1"]
    assert f"{100 * top1:.2f}" in page
    assert not re.search(r"""(src|href)=["']https?://""", page)


def test_it_is_served(path):
    pytest.importorskip("uvicorn")
    serve = [sys.executable, "-m", "netfission", "serve", str(path / "run"), "--port", "0"]
    image = sorted((path / "images" / "test").rglob("*.png"))[0]
    server = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)
    try:
        port = int(
            next(found for line in server.stdout if (found := re.search(r"127\.0\.0\.1:(\d+)", line)))[1]
        )
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/predict", image.read_bytes())
        answer = json.loads(connection.getresponse().read())
        connection.close()
    finally:
        server.terminate()
        server.communicate()
    out = path / "one.csv"
    assert main(["predict", str(path / "run"), str(image), "--out", str(out)]) == 0
    (row,) = csv.DictReader(out.read_text("utf-8").splitlines())
    assert answer["class"] == row["class"]
    assert answer["probability"] == pytest.approx(float(row["probability"]), abs=1e-4)
    assert [each["class"] for each in answer["exits"]] == [row[f"exit_{number}"] for number in range(3)]
