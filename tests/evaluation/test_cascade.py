import errno
import json
import os
import shutil
import xml.etree.ElementTree as ET
from dataclasses import asdict, replace
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import netfission as nf
from netfission.cli import main
from netfission.config import DataConfig, FissionConfig, ModelConfig, RunConfig, TrainingConfig
from netfission.evaluation import cascade as module
from netfission.evaluation.cascade import CascadeEvaluation, Point, evaluate_cascade
from netfission.evaluation.cascade_plot import draw_cascade
from netfission.inference import choose_thresholds, exit_costs
from netfission.inference.deployment import Deployed
from netfission.inference.thresholds import CascadeChoice
from netfission.models import create_model
from netfission.profiling.macs import count_macs
from netfission.profiling.timing import inference_times
from netfission.runs.evaluate import evaluate_cascade as evaluate_cascade_of_run
from netfission.runs.folder import RunFolder
from netfission.runs.train import train

CONFIG = RunConfig(
    DataConfig("digits", limit_per_class=10),
    ModelConfig("wrn-10-1"),
    FissionConfig(exits=3, grouping="copies"),
    TrainingConfig(epochs=2, batch_size=25, accelerator="cpu"),
)


@pytest.fixture(autouse=True)
def _short_timing(monkeypatch) -> None:
    monkeypatch.setattr(module, "IMAGES_PER_ROUND", {1: 2, 256: 8})
    monkeypatch.setattr(module, "MIN_ROUNDS", 2)
    monkeypatch.setattr(module, "MAX_ROUNDS", 2)
    monkeypatch.setattr(module, "CURVE_TIMED", 2)


@pytest.fixture
def untimed(monkeypatch) -> None:
    """All take the same time, for tests that do not look at it: to measure it takes most of theirs."""
    monkeypatch.setattr(
        module,
        "_time_ratios",
        lambda network, single, variants, answers, images, batches: {
            size: [(1.0,)] * (1 + len(variants)) for size in batches
        },
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a finished run with a validation split."""
    path = tmp_path_factory.mktemp("cascade") / "run"
    train(CONFIG, path, progress=False)
    return path


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """The folder of a finished run of the same model with one exit, without a validation split."""
    path = tmp_path_factory.mktemp("cascade") / "single"
    config = replace(
        CONFIG,
        data=replace(CONFIG.data, validation=0.0),
        fission=FissionConfig(exits=1),
        training=replace(CONFIG.training, epochs=1),
    )
    train(config, path, progress=False)
    return path


def points_of(record: dict, kind: str) -> list[dict]:
    return [point for point in record["points"] if point["kind"] == kind]


def test_the_single_network_of_a_fine_tuning_is_shown_unless_another_is_named(
    run, single, tmp_path, monkeypatch
) -> None:
    asked = []

    def evaluate(folder, config, **settings) -> None:
        asked.append(settings["single"])
        raise ValueError("a stop")

    monkeypatch.setattr("netfission.runs.evaluate.evaluate_cascade", evaluate)
    both = shutil.copytree(run, tmp_path / "both")
    shutil.copytree(single, both / "single")
    settings = RunFolder(both).load_config().to_dict() | {"weights": str(both / "single")}
    RunFolder(both).config.write_text(RunConfig.from_dict(settings).to_yaml())
    for folder, *flags in ((run,), (both,), (both, "--single", str(single))):
        assert main(["evaluate", str(folder), "--cascade", *flags]) == 2
    assert [folder and folder.path for folder in asked] == [None, both / "single", single]


def test_the_command_prints_and_keeps_everything(run, single, capsys) -> None:
    assert main(["evaluate", str(run), "--cascade", "--single", str(single)]) == 0
    printed = capsys.readouterr().out
    record = json.loads((run / "cascade.json").read_text("utf-8"))
    assert (record["max_accuracy_drop"], record["max_cost"], record["rule"]) == (0.2, None, "margin")
    assert (record["validation_images"], record["test_images"]) == (145, 359)
    assert record["environment"]["threads"] == torch.get_num_threads()
    assert record["weights"] == RunFolder(run).weights_sha256()
    evaluation = json.loads((run / "evaluation.json").read_text("utf-8"))
    alone = json.loads((single / "evaluation.json").read_text("utf-8"))
    (of_single,), (full,), (chosen,) = (points_of(record, kind) for kind in ("single", "ensemble", "chosen"))
    assert of_single["accuracy"] == pytest.approx(alone["ensemble"]["top1"])
    assert full["accuracy"] == pytest.approx(evaluation["ensemble"]["top1"])
    exits = points_of(record, "exit")
    assert [e["accuracy"] for e in exits] == pytest.approx([e["top1"] for e in evaluation["exits"]])
    assert [e["exits_used"] for e in (*exits, full)] == [1, 1, 1, 3]
    assert (of_single["macs"], exits[0]["macs"]) == (1, 1)  # with whole copies exit 0 is the single network
    assert exits[0]["macs"] <= chosen["macs"] <= full["macs"]
    assert chosen["thresholds"] == record["choice"]["thresholds"]
    curve = points_of(record, "curve")
    assert 1 <= sum(bool(point["times"]) for point in curve) <= module.CURVE_TIMED
    for point in (of_single, full, chosen, *exits):
        assert point["times"].keys() == {"1", "256"}
    assert record["rounds"] == {"1": 2, "256": 2}
    for point in record["points"]:
        for ratio in point["times"].values():
            assert 0 < ratio["lower"] <= ratio["median"] <= ratio["upper"]
        if point["times"]:
            assert f"\n{point['name']}" in printed
    assert {ratio["median"] for ratio in of_single["times"].values()} == {1}
    assert f"{100 * full['accuracy']:.2f}" in printed
    assert f"in {run}" in printed
    assert (run / "cascade.png").read_bytes().startswith(b"\x89PNG")
    assert ET.parse(run / "cascade.svg").getroot().tag.endswith("svg")
    assert not list(run.glob("*.tmp"))


@pytest.mark.usefixtures("untimed")
def test_what_may_be_spent_can_be_given_instead(run, capsys) -> None:
    flags = ["--max_cost", "1.2", "--rule", "agreement"]
    assert main(["evaluate", str(run), "--cascade", *flags]) == 0
    assert "Chosen for cost ≤ 1.2× on" in capsys.readouterr().out
    record = json.loads((run / "cascade.json").read_text("utf-8"))
    assert (record["max_accuracy_drop"], record["max_cost"], record["rule"]) == (None, 1.2, "agreement")
    assert record["choice"]["cost"] <= 1.2


@pytest.mark.usefixtures("untimed")
def test_the_drop_can_be_bounded_for_new_images(run, capsys) -> None:
    assert main(["evaluate", str(run), *["--cascade", "--max-accuracy-drop", "8", "--delta", "0.2"]]) == 0
    printed = capsys.readouterr().out
    assert "On new images the drop is within the bound with a probability of 0.8 over the choice" in printed
    record = json.loads((run / "cascade.json").read_text("utf-8"))
    assert (record["max_accuracy_drop"], record["delta"]) == (8, 0.2)
    (chosen,) = points_of(record, "chosen")
    assert chosen["thresholds"] == record["choice"]["thresholds"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--delta 0.1", "--delta must be left out unless --cascade is given, got 0.1"),
        ("--cascade --delta 1", "--delta must be a probability above 0 and below 1, got 1.0"),
        ("--cascade --max-cost 1.2 --delta 0.1", "--delta must be left out with --max-cost, got 0.1"),
        (
            "--cascade --delta 0.1",
            "--max-accuracy-drop must be at least 3.21 points with 145 images and delta=0.1, got 0.2; 2,306 ",
        ),
        (
            "--max-accuracy-drop 0.2",
            "--max-accuracy-drop must be left out unless --cascade is given, got 0.2",
        ),
        ("--single elsewhere", "--single must be left out unless --cascade is given, got 'elsewhere'"),
        (
            "--cascade --max-accuracy-drop 1 --max-cost 1",
            "--max-cost must be left out if --max-accuracy-drop is given, got 1.0",
        ),
        (
            "--cascade --max-accuracy-drop -1",
            "--max-accuracy-drop must be from 0 to 100 percentage points, unless --max-cost is given, got -1",
        ),
        ("--cascade --max-cost 0.3", "--max-cost must be at least 1, the cost of the first exit, got 0.3"),
        (
            "--cascade --rule confident",
            "--rule must be one of margin, confidence, agreement, got 'confident'",
        ),
        (
            "--cascade --single {run}",
            "--single must be a run of wrn-10-1 with exits=1 on the same data, got ",
        ),
        (
            "--cascade --single elsewhere",
            "elsewhere must be the folder of a run, got nothing there",
        ),
    ],
)
def test_a_bad_request_ends_in_one_line_and_status_2(flags, message, run, capsys) -> None:
    assert main(["evaluate", str(run), *flags.format(run=run).split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_images_that_the_epoch_was_chosen_on_promise_nothing(run) -> None:
    folder = RunFolder(run)
    config = folder.load_config()
    config = replace(config, training=replace(config.training, patience=2))
    with pytest.raises(ValueError, match=r"^delta must be left out for this run, got 0\.1; patience"):
        evaluate_cascade_of_run(folder, config, max_accuracy_drop=8.0, delta=0.1)


def test_a_run_without_validation_split_is_refused(single, capsys) -> None:
    assert main(["evaluate", str(single), "--cascade"]) == 2
    assert "validation must be above 0 to choose the thresholds" in capsys.readouterr().err
    assert not list(single.glob("cascade.*"))


def test_a_run_of_one_exit_is_refused(tmp_path, capsys) -> None:
    config = replace(
        CONFIG,
        fission=FissionConfig(exits=1),
        training=replace(CONFIG.training, epochs=1),
    )
    train(config, tmp_path / "run", progress=False)
    assert main(["evaluate", str(tmp_path / "run"), "--cascade"]) == 2
    assert "exits must be 2 or more for a cascade, got 1" in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_files(run, capsys, monkeypatch) -> None:
    for kind in ("json", "png", "svg"):
        (run / f"cascade.{kind}").write_text("old")
    evaluation = measured()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_full)
        assert main(["evaluate", str(run), "--cascade"]) == 1
        with pytest.raises(OSError, match="No space left"):
            draw_cascade(evaluation, run / "cascade")
    assert "No space left" in capsys.readouterr().err
    assert {path.read_text("utf-8") for path in run.glob("cascade.*")} == {"old"}


def disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


MODEL = create_model("wrn-10-1", 5).eval()
IMAGES = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NETWORK = nf.fission(MODEL, 3, example_input=IMAGES[:2]).eval()


def labelled(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (n,), generator=generator)
    logits = torch.randn(n, 3, 5, generator=generator)
    logits[torch.arange(n), :, labels] += 4 * torch.rand(n, 1, generator=generator)
    return logits, labels


@cache
def measured() -> CascadeEvaluation:
    return evaluate_cascade(NETWORK, MODEL, labelled(200, 0), labelled(300, 1), IMAGES, max_accuracy_drop=1.0)


def test_the_test_images_choose_nothing() -> None:
    first, other = measured(), labelled(300, 2)
    second = evaluate_cascade(NETWORK, MODEL, labelled(200, 0), other, IMAGES, max_accuracy_drop=1.0)
    assert first.choice == second.choice
    assert [p.thresholds for p in first.points] == [p.thresholds for p in second.points]
    assert [p.accuracy for p in first.points] != [p.accuracy for p in second.points]
    unit = count_macs(MODEL, IMAGES[:1]).dense
    costs = exit_costs(NETWORK, IMAGES)
    relative = [macs / unit for macs in costs.dense]
    assert first.choice == choose_thresholds(
        *labelled(200, 0), relative, order=costs.order, max_accuracy_drop=1.0
    )


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("bound", [{"max_cost": 1.4}, {"max_accuracy_drop": 1.0}])
def test_a_bound_that_the_test_images_exceed_is_marked_in_its_row(bound) -> None:
    logits, labels = labelled(300, 1)
    unsure = logits / 100  # so that more exits run than for the validation images
    wrong_at_first = logits.clone()
    wrong_at_first[:, 0] = -logits[:, 0].sign() * 100  # unlike the ensemble of the others
    wrong_at_first[:, 1:] *= 1000
    test = unsure if "max_cost" in bound else wrong_at_first
    remark = "exceeded: kept on the validation images, but not on the test images."
    for shown, exceeds in ((test, True), (labelled(200, 0)[0], False)):
        answers = labels if exceeds else labelled(200, 0)[1]
        evaluation = evaluate_cascade(NETWORK, MODEL, labelled(200, 0), (shown, answers), IMAGES, **bound)
        (chosen,) = (point for point in evaluation.points if point.kind == "chosen")
        if "max_cost" in bound:
            assert (chosen.macs > bound["max_cost"]) == exceeds
        else:
            assert (100 * chosen.accuracy_drop > bound["max_accuracy_drop"]) == exceeds
        (row,) = (line for line in evaluation.table().splitlines() if line.startswith(f"{chosen.name} "))
        assert row.startswith(f"{chosen.name} (exceeded) ") == chosen.exceeds == exceeds
        assert (remark in evaluation.table()) == exceeds


@pytest.mark.usefixtures("untimed")
def test_a_bound_for_new_images_is_no_less_strict() -> None:
    examples = labelled(400, 0), labelled(300, 1)
    settings = {"max_accuracy_drop": 5.0}
    bounded = evaluate_cascade(NETWORK, MODEL, *examples, IMAGES, **settings, delta=0.1)
    assert bounded.choice.cost > evaluate_cascade(NETWORK, MODEL, *examples, IMAGES, **settings).choice.cost
    (chosen,) = (point for point in bounded.points if point.kind == "chosen")
    assert chosen.thresholds == bounded.choice.thresholds
    with pytest.raises(ValueError, match=r"^delta must be left out unless max_accuracy_drop is given"):
        evaluate_cascade(NETWORK, MODEL, *examples, IMAGES, max_cost=1.2, delta=0.1)


def test_losses_come_with_their_standard_error() -> None:
    evaluation = measured()
    logits, labels = labelled(300, 1)
    full = (logits.mean(1).argmax(1) == labels).double()
    for point in evaluation.points:
        if point.kind == "exit":
            difference = full - (logits[:, int(point.name[-1])].argmax(1) == labels).double()
            assert point.accuracy_drop == pytest.approx(difference.mean().item())
            assert point.accuracy_drop_error == pytest.approx(difference.std(correction=0).item() / 300**0.5)


def test_all_are_timed_deployed_and_in_batches_of_each_size(monkeypatch) -> None:
    largest = []

    def watched(readers: dict[str, nn.Module], images: Tensor, **settings: int) -> dict[str, list[float]]:
        deployed = [[m for m in each.modules() if isinstance(m, Deployed)] for each in readers.values()]
        assert all(deployed)
        sizes: list[int] = []
        handles = [
            part.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
            for parts in deployed
            for part in parts
        ]
        times = inference_times(readers, images, **settings)
        for handle in handles:
            handle.remove()
        largest.append(max(sizes))
        return times

    monkeypatch.setattr(module, "inference_times", watched)
    evaluation = evaluate_cascade(
        NETWORK, MODEL, labelled(200, 0), labelled(300, 1), IMAGES, max_accuracy_drop=1.0
    )
    assert largest == [1, 1, 1, 8, 8, 8]
    assert {size for point in evaluation.points for size in point.times} == {1, 256}


def test_the_curve_rises_with_its_cost() -> None:
    points = [point for point in measured().points if point.kind == "curve"]
    assert len(points) > 3
    assert [point.macs for point in points] == sorted(point.macs for point in points)
    assert points[0].exits_used == 1


def test_the_bound_is_drawn_and_named(tmp_path) -> None:
    evaluation = replace(measured(), max_accuracy_drop=2.0, max_cost=None, delta=0.2)
    full = next(point.accuracy for point in evaluation.points if point.kind == "ensemble")
    assert evaluation.least_accuracy == pytest.approx(full - 0.02)
    draw_cascade(evaluation, tmp_path / "picture")
    assert "accepted loss, 2 points (kept with probability 0.8)" in (tmp_path / "picture.svg").read_text(
        "utf-8"
    )
    assert replace(evaluation, max_accuracy_drop=None, max_cost=1.0, delta=None).least_accuracy is None


def test_without_the_single_networks_accuracy_its_cost_still_stands(tmp_path) -> None:
    evaluation = measured()
    assert evaluation.points[0].accuracy is None
    row = evaluation.table().splitlines()[1]
    assert row.split()[:4] == ["single", "network", "1.000×", "1.000×"]
    assert [file.suffix for file in draw_cascade(evaluation, tmp_path / "picture")] == [".png", ".svg"]
    assert json.dumps(asdict(evaluation), allow_nan=False)


def test_no_name_covers_another_and_no_legend_a_point(monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(
        "netfission.evaluation.cascade_plot.save_picture", lambda figure, path: drawn.append(figure) or []
    )
    kinds = [("single network", "single", 1.0, 0.5), ("full ensemble", "ensemble", 1.0, 0.7)]
    kinds += [(f"exit {number}", "exit", 0.5, 0.6) for number in range(3)]
    points = [Point(name, kind, macs, macs, accuracy) for name, kind, macs, accuracy in kinds]
    choice = CascadeChoice((0.4,), 0.7, 0.7, 0.6)
    evaluation = CascadeEvaluation("margin", (1, 0), 50.0, None, choice, 0.7, 36, 359, {}, points)
    draw_cascade(evaluation, Path("picture"))
    figure = drawn[0]
    figure.draw_without_rendering()
    counted = figure.axes[0]
    names = [text.get_window_extent() for text in counted.texts]
    assert len(names) == 3 and not any(one.overlaps(other) for one, other in combinations(names, 2))
    assert not counted.get_legend().get_window_extent().overlaps(counted.get_window_extent())
    assert counted.get_ylim()[0] > 40  # the bound, 20 %, is far below, and told in the legend
    assert "accepted loss, 50 points: below the picture" in counted.get_legend_handles_labels()[1]
    evaluation = replace(evaluation, max_accuracy_drop=30.0)
    assert evaluation.drawn_bound == evaluation.least_accuracy == pytest.approx(0.4)
