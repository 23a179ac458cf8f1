"""The server of labels, numbers and maps of pixels: its answers are those of `netfission predict`."""

import base64
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.datastructures import QueryParams

from netfission.classifier import Predictor
from netfission.classifier.answer_settings import AnswerSettings
from netfission.cli import main
from netfission.evaluation.drift import drift_p_value
from netfission.serve.server import Settings, make_server
from netfission.serve.targets import TargetAnswerer
from netfission.tasks.registry import TASKS, find_task

testclient = pytest.importorskip("starlette.testclient")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OTHERS = [name for name in TASKS if not find_task(name, ["a"]).targets.exclusive]


def client_of(run):
    """Asks the application of a server, without a socket; a context, in which it runs."""
    server = make_server(str(run), Settings(device="cpu", threads=1))
    return testclient.TestClient(server.config.app, "http://127.0.0.1")


@pytest.fixture(scope="module")
def served(run_of):
    """Task → the client of a server that runs."""
    clients = {task: client_of(run_of(task)) for task in OTHERS}
    for client in clients.values():
        client.__enter__()
    yield clients
    for client in clients.values():
        client.__exit__(None, None, None)


def form(*paths):
    return [("image", (path.name, path.read_bytes())) for path in paths]


def near(expected):
    """A record up to rounding: the server runs a deployed network, and a file has six digits."""
    if isinstance(expected, dict):
        return {name: near(value) for name, value in expected.items()}
    return pytest.approx(expected, rel=1e-3, abs=1e-4) if isinstance(expected, float) else expected


def opened(address):
    kind, _, content = address.partition(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


@pytest.mark.parametrize("task", OTHERS)
def test_an_answer_is_what_predict_writes(served, run_of, tables, capsys, tmp_path, task):
    photograph = tmp_path / "large.png"
    with Image.open(tables / "5.png") as image:
        image.resize((20, 12)).save(photograph)
    images = [tables / "61.png", photograph, tables / "62.png"]
    flags = ["--format", "jsonl"]
    assert main(["predict", str(run_of(task)), *map(str, images), *flags]) == 0
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    answers = served[task].post("/predict", files=form(*images)).json()["predictions"]
    for answer, record in zip(answers, expected, strict=True):
        answer.pop("maps", None)
        del record["image"]
        assert answer == near(record)
    alone = served[task].post("/predict", content=images[0].read_bytes()).json()
    assert alone.pop("seconds") > 0
    alone.pop("maps", None)
    assert alone == near(answers[0])


def test_maps_are_the_files_that_predict_writes(served, run_of, tables, capsys, tmp_path):
    photograph = tmp_path / "large.png"
    with Image.open(tables / "5.png") as image:
        image.resize((20, 12)).save(photograph)
    for path in (tables / "61.png", photograph):
        assert main(["predict", str(run_of("segmentation")), str(path), "--out", str(tmp_path / "maps")]) == 0
        maps = served["segmentation"].post("/predict", content=path.read_bytes()).json()["maps"]
        found = {"classes": "", "uncertainty": "-uncertainty"}
        assert list(maps) == list(found)
        for name, ending in found.items():
            with Image.open(tmp_path / "maps" / f"{path.stem}{ending}.png") as written:
                answer = opened(maps[name])
                assert (answer.mode, answer.size, answer.info) == (written.mode, written.size, written.info)
                assert answer.getpalette() == written.getpalette()
                differ = np.asarray(answer, int) - np.asarray(written, int)
                # One level by rounding; classes differ nowhere, as no pixel of these images is undecided.
                assert np.abs(differ).max() <= (name == "uncertainty")


def test_numbers_have_intervals_if_a_request_or_the_server_asks_for_them(served, run_of, tables, capsys):
    image = tables / "61.png"
    assert (
        main(["predict", str(run_of("regression")), str(image), "--coverage", "0.8", "--format", "jsonl"])
        == 0
    )
    expected = json.loads(capsys.readouterr().out)
    del expected["image"]
    answer = served["regression"].post("/predict?coverage=0.8", content=image.read_bytes()).json()
    del answer["seconds"]
    assert answer == near(expected) and answer["coverage"] == 0.8
    own = TargetAnswerer(Predictor.from_pretrained(run_of("regression")), None, AnswerSettings(coverage=0.8))
    with Image.open(image) as opened_image:
        (result,) = own.run([own.read(opened_image)])
    assert result.answer == near(expected) and own.describe()["coverage"] == 0.8
    assert own.question(QueryParams("coverage=0.8")) is None


@pytest.mark.parametrize("task", OTHERS)
def test_a_result_holds_no_outputs_but_its_own_and_none_if_nothing_reads_them(run_of, tables, task):
    own = TargetAnswerer(Predictor.from_pretrained(run_of(task)))
    with Image.open(tables / "61.png") as image:
        results = list(own.run([own.read(image)] * 3))
    kept = [result.outputs for result in results if result.outputs is not None]
    assert len(kept) == (3 if own.parameters else 0)
    shape = (own.predictor.spec.predictions, own.task.outputs)
    assert all(outputs.shape == shape for outputs in kept)
    assert all(outputs.untyped_storage().nbytes() == outputs.nbytes for outputs in kept)


@pytest.mark.parametrize("task", OTHERS)
def test_maps_are_drawn_one_by_one_and_large_ones_fill_a_batch(run_of, tables, monkeypatch, task):
    own = TargetAnswerer(Predictor.from_pretrained(run_of(task)))
    answered, answers = [], own.task.answers
    monkeypatch.setattr(own.task, "answers", lambda found: answered.append(answers(found)) or answered[-1])
    with Image.open(tables / "61.png") as image:
        small = own.read(image)
    large = small._replace(size=(4096, 4096))
    assert next(iter(own.run([small] * 3))).answer == answered[0][0]
    drawn = task == "segmentation"
    assert [len(part) for part in answered] == [1 if drawn else 3]
    assert [own.share(image) for image in (small, large)] == ([64 / 2**23, 2] if drawn else [0, 0])


@pytest.mark.parametrize("task", OTHERS)
def test_requests_that_cannot_be_answered_get_one_line(served, tables, task):
    content = (tables / "1.png").read_bytes()
    coverage = "coverage must be " if task == "regression" else "query must be left out"
    for query, body, status, message in (
        ("", b"hello", 415, "image must be a file in "),
        ("", content[:60], 400, "image must be an undamaged file"),
        ("?risk=0.1", content, 400, "query must be "),
        ("?all=1", content, 400, "query must be "),
        ("?coverage=2", content, 400, coverage),
    ):
        answer = served[task].post(f"/predict{query}", content=body)
        assert answer.status_code == status, query
        error = answer.json()["error"]
        assert error.startswith(message) and "\n" not in error


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        (
            "multilabel",
            {"answers": AnswerSettings(risk=0.0)},
            "^risk must be left out for a run of ",
        ),
        (
            "multilabel",
            {"answers": AnswerSettings(coverage=0.9)},
            "^coverage must be left out for a run of ",
        ),
        (
            "regression",
            {"answers": AnswerSettings(coverage=0.99)},
            "^coverage must be at most 0.9523, for 20",
        ),
    ],
)
def test_what_has_no_meaning_for_a_task_is_refused_when_the_server_starts(run_of, task, settings, message):
    with pytest.raises(ValueError, match=message):
        TargetAnswerer(Predictor.from_pretrained(run_of(task)), **settings)


@pytest.mark.parametrize("task", OTHERS)
def test_the_last_images_are_compared_with_those_of_the_calibration(run_of, tables, task):
    predictor = Predictor.from_pretrained(run_of(task))
    own = TargetAnswerer(predictor, drift_window=2)
    assert len(predictor.calibration.uncertainty) == 20 and np.isnan(own.drift.p_value())
    images = []
    for number in range(40, 62):  # the validation images, and two of the test split
        with Image.open(tables / f"{number}.png") as image:
            images.append(own.read(image if number < 61 else image.crop((0, 0, 8, 4))))
    list(own.run(images))
    outputs, average = (
        predictor.logits(torch.stack([image.pixels for image in images])),
        predictor.spec.average,
    )
    sizes = [image.size for image in images]
    scores = predictor.task.total_uncertainty(outputs, average=average, sizes=sizes)
    calibration = scores[:20].sort().values
    assert predictor.calibration.uncertainty == pytest.approx(calibration.tolist(), rel=1e-5)
    assert len(own.drift) == 2
    known = torch.tensor(predictor.calibration.uncertainty, dtype=torch.float64)
    assert own.drift._scores[-1] == pytest.approx(scores[-1].item())
    assert own.drift.p_value() == pytest.approx(drift_p_value(scores[20:], known))
    named = predictor.task.uncertainty_scores(outputs, average=average)
    assert any(torch.allclose(values[:21], scores[:21]) for values in named.values())
    predictor.calibration = replace(predictor.calibration, uncertainty=[])
    with pytest.raises(ValueError, match=r"^drift_window must be left out for a network without"):
        TargetAnswerer(predictor, drift_window=2)
    assert not TargetAnswerer(predictor).drift.keeps


@pytest.mark.parametrize("task", OTHERS)
def test_the_network_is_described(served, run_of, task):
    told = served[task].get("/model").json()
    evaluation = json.loads((run_of(task) / "evaluation.json").read_text("utf-8"))
    assert told["task"] == task and told["measures"] == evaluation["ensemble"]
    assert told["test_images"] == 20 and told["calibration_images"] == 20
    assert list(told["colors"].values()) == (["#000000", "#800000", "#008000"] if told["colors"] else [])
    metrics = served[task].get("/metrics").text
    assert "netfission_images_total" in metrics and "netfission_drift_images " in metrics


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_shows_each_kind_of_answer(served, tables):
    sync_api = pytest.importorskip("playwright.sync_api")
    complaints = []

    def answered_by(client):
        def answer(route, request):
            told = client.request(request.method, request.url, content=request.post_data_buffer)
            route.fulfill(status=told.status_code, headers=dict(told.headers), body=told.content)

        return answer

    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 400, "height": 800})
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        shown = {}
        for task, client in served.items():
            page.unroute_all()
            page.route("http://127.0.0.1/**", answered_by(client))
            page.goto("http://127.0.0.1/")
            page.set_input_files("#file", tables / "61.png")
            page.wait_for_selector("#predicted:not([hidden])")
            shown[task] = page.inner_text("#predicted").replace("\u00a0", " ")
            assert page.is_hidden("#classified") and page.evaluate("document.body.scrollWidth <= innerWidth")
            if served[task].get("/model").json()["colors"]:
                decoded = "Promise.all([...document.querySelectorAll('.maps img')].map(one => one.decode()))"
                page.evaluate(decoded)
                sizes = "all => all.map(one => [one.naturalWidth, one.naturalHeight])"
                assert page.eval_on_selector_all(".maps img", sizes) == [[8, 8]] * 3
            if task == "regression":
                told = client.post("/predict", content=(tables / "61.png").read_bytes()).json()
                names = list(told["mean"])
                told |= {"mean": dict.fromkeys(names, -34_471_234.0), "std": dict.fromkeys(names, 1e20)}
                page.route("**/predict", lambda route, request, told=told: route.fulfill(json=told))
                page.set_input_files("#file", tables / "61.png")
                page.wait_for_selector(".axis.beyond-low.beyond-high")
                huge = page.inner_text("#predicted").replace("\u00a0", " ")
        browser.close()
    assert complaints == []
    assert "\u221234,470,000 ± 1.000e+20" in huge and "goes on beyond the line" in huge
    assert "goes on beyond" not in shown["regression"]
    body = (tables / "61.png").read_bytes()
    answers = {task: client.post("/predict", content=body).json() for task, client in served.items()}
    for name, share in answers["segmentation"]["shares"].items():
        assert (f"{name}\n{100 * share:.1f} %" in shown["segmentation"]) == (share > 0)
    for name, share in answers["multilabel"]["probabilities"].items():
        assert name in shown["multilabel"] and f"{100 * share:.1f} %" in shown["multilabel"]
    mean, std = (answers["regression"][name]["blue"] for name in ("mean", "std"))
    assert f"{float(f'{mean:.4g}'):g} ± {float(f'{std:.4g}'):g}" in shown["regression"]
