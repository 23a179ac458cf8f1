"""Early exit of networks of labels, numbers and pixels, image by image and tile by tile."""

import json
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import netfission as nf
from netfission.cli import main
from netfission.data.mask_folders import VOID
from netfission.evaluation import cascade as timing
from netfission.evaluation.pixels import PixelScores
from netfission.evaluation.target_cascade import Tiling
from netfission.inference.tiles import TileCascade, tile_costs
from netfission.inference.unit_thresholds import UnitCounts, UnitSearch
from netfission.profiling.macs import count_macs
from netfission.runs import evaluate as module
from netfission.runs.folder import RunFolder
from netfission.tasks import find_task
from netfission.tasks.gaussians import mixture, moments, outputs_of

NAMES = ["a", "b", "c"]
SCALE = {"mean": [1.0, 0.0, 5.0], "std": [2.0, 1.0, 0.5]}
OTHERS = ("multilabel", "regression", "segmentation")


def answers_of(task, seed, images=12, exits=3):
    """Outputs of exits, and targets."""
    generator = torch.Generator().manual_seed(seed)
    outputs = {"multilabel": (3,), "regression": (6,), "segmentation": (3, 4, 6)}[task]
    found = torch.randn(images, exits, *outputs, generator=generator)
    if task == "segmentation":
        masks = torch.randint(4, (images, 4, 6), generator=generator)
        return found, masks.where(masks < 3, VOID)
    drawn = torch.randn(images, 3, generator=generator)
    return found, (drawn > 0).float() if task == "multilabel" else drawn


@given(seed=st.integers(0, 100))
@settings(max_examples=10)
def test_measures_are_those_of_the_evaluation(seed):
    outputs, masks = answers_of("segmentation", seed)
    rule = find_task("segmentation", NAMES).early_exit()
    full = rule.combined(outputs)
    scores = PixelScores(3, VOID)
    scores.add(full.log_softmax(dim=1), masks)
    assert rule.score(rule.counts(full, masks).sum(dim=0)).item() == pytest.approx(
        scores.result()["mean_iou"]
    )

    outputs, numbers = answers_of("regression", seed)
    task = find_task("regression", NAMES, SCALE)
    rule = task.early_exit()
    score = rule.score(rule.counts(rule.combined(outputs), numbers).sum(dim=0)).item()
    errors = (task.predict(outputs, average="logits").mean - numbers).abs() / torch.tensor(SCALE["std"])
    assert score == pytest.approx(1 - errors.mean().item(), rel=1e-4)

    outputs, labels = answers_of("multilabel", seed)
    rule = find_task("multilabel", NAMES).early_exit()
    full = rule.combined(outputs)
    right = ((full > 0) == (labels > 0.5)).double().mean()
    assert rule.score(rule.counts(full, labels).sum(dim=0)).item() == pytest.approx(right.item())


@pytest.mark.parametrize("task", OTHERS)
def test_expected_counts_are_means_over_targets_drawn_from_the_ensemble(task):
    outputs, targets = answers_of(task, 0, images=2)
    rule = find_task(task, NAMES, SCALE if task == "regression" else None).early_exit()
    first, full = outputs[:, 0], rule.combined(outputs)
    generator = torch.Generator().manual_seed(1)
    drawn = 4000
    if task == "segmentation":
        classes = full.softmax(dim=1).movedim(1, -1).flatten(0, 2)
        labels = classes.multinomial(drawn, replacement=True, generator=generator).T.view(
            drawn, *targets.shape
        )
        labels = labels.where(targets != VOID, VOID)
    elif task == "multilabel":
        labels = (torch.rand(drawn, *full.shape, generator=generator) < full.sigmoid()).float()
    else:
        mean, variance = (part.squeeze(1) for part in moments(full.unsqueeze(1)))
        scaled = mean + variance.sqrt() * torch.randn(drawn, *mean.shape, generator=generator)
        labels = scaled * torch.tensor(SCALE["std"]) + torch.tensor(SCALE["mean"])
    repeated = first.repeat(drawn, *[1] * (first.ndim - 1))
    mean_counts = rule.counts(repeated, labels.flatten(0, 1)).view(drawn, 2, -1).mean(dim=0)
    expected = rule.expected_counts(first, full, targets)
    assert torch.allclose(mean_counts, expected, rtol=0.03, atol=0.1)


@pytest.mark.parametrize("task", OTHERS)
def test_confidence_is_of_the_batch_above_zero_and_higher_for_sharper_outputs(task):
    outputs, _ = answers_of(task, 3)
    rule = find_task(task, NAMES, SCALE if task == "regression" else None).early_exit()
    output = rule.combined(outputs[:, :1])
    assert torch.allclose(output, outputs[:, 0], atol=1e-4)  # one exit stands for itself
    sharper = output - 1 if task == "regression" else 3 * output
    before, after = rule.confidence(output), rule.confidence(sharper)
    assert before.shape == (12,) and ((before > 0) & (before < after) & (after <= 1)).all()
    undecided = torch.full_like(output, 50.0) if task == "regression" else torch.zeros_like(output)
    assert (rule.confidence(undecided) > 0).all()  # so that a threshold of 0 stops everything


@given(seed=st.integers(0, 1000), exits=st.integers(1, 4))
@settings(max_examples=20)
def test_one_output_has_the_moments_of_the_mixture(seed, exits):
    outputs = torch.randn(5, exits, 4, generator=torch.Generator().manual_seed(seed)).double()
    weights = list(range(1, exits + 1))
    center, variance, _ = mixture(*moments(outputs), weights)
    mean, again = moments(outputs_of(center, variance).unsqueeze(1))
    assert torch.allclose(mean.squeeze(1), center)
    bounded = variance.log().clamp(-9.999, 1.999).exp()
    assert torch.allclose(again.squeeze(1), bounded)


def units_of(seed, images=30, exits=3):
    generator = torch.Generator().manual_seed(seed)
    wrong = (torch.rand(images, exits, generator=generator) < torch.tensor([0.4, 0.3, 0.2])[:exits]).double()
    counts = torch.stack([1 - wrong, torch.ones_like(wrong)], dim=2)
    confidence = torch.rand(images, exits - 1, generator=generator)
    return UnitCounts(confidence, counts, counts, counts[:, -1], counts[:, -1], torch.arange(images))


def share(sums):
    return sums[..., 0] / sums[..., 1]


@given(seed=st.integers(0, 100), target=st.sampled_from([{"max_accuracy_drop": 3.0}, {"max_cost": 1.4}]))
@settings(max_examples=3, deadline=None)
def test_thresholds_meet_their_target_and_no_other_combination_does_better(seed, target):
    units, costs = units_of(seed), [0.5, 0.5, 1.0]
    search = UnitSearch(units, share, costs)
    choice = search.choose(**target)
    steps = units.stop(choice.thresholds)
    reached = units.at(steps)
    assert share(reached.sum(dim=0)).item() == choice.accuracy
    assert torch.tensor(costs).cumsum(0)[steps].mean().item() == pytest.approx(choice.cost)
    full = share(units.full.sum(dim=0)).item()
    for other in ((0.0, 0.0), (0.5, 0.5), (0.5, 1.0), (1.0, 1.0)):
        at = units.stop(other)
        cost = torch.tensor(costs).cumsum(0)[at].mean().item()
        score = share(units.at(at).sum(dim=0)).item()
        if "max_cost" in target:
            assert choice.cost <= 1.4 + 1e-6 and (cost > 1.4 or score <= choice.accuracy + 0.05)
        elif full - score <= 0.03:
            assert choice.cost <= cost + 0.1
    if "max_accuracy_drop" in target:
        assert full - choice.accuracy <= 0.03 + 1e-9


def test_a_loss_that_no_thresholds_keep_is_refused_with_the_least():
    units = units_of(0)
    better = torch.ones_like(units.full)
    search = UnitSearch(
        UnitCounts(units.confidence, units.counted, units.expected, better, better, units.images),
        share,
        [1.0, 1.0, 1.0],
    )
    with pytest.raises(ValueError, match=r"^max_accuracy_drop must be at least \d+\.?\d* points, the least"):
        search.choose(max_accuracy_drop=0.2)


def layers(*channels):
    return nn.Sequential(
        *(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in pairwise(channels)
        ),
        nn.Conv2d(channels[-1], 3, 1),
    )


torch.manual_seed(0)
IMAGES = torch.rand(2, 3, 12, 16)
NETWORK = nf.fission(layers(3, 6, 6, 6), 3, example_input=IMAGES, grouping="channels").eval()
RULE = find_task("segmentation", NAMES).early_exit()


def tiles(thresholds, **settings):
    return TileCascade(NETWORK, thresholds, **{"tile": 4, "order": (0, 2, 1), "rule": RULE} | settings)


def test_a_halo_as_wide_as_the_receptive_field_gives_the_maps_of_the_whole_image():
    with torch.no_grad():
        outputs = NETWORK(IMAGES)
    # Exits 1 and 2 have two and one convolutions of 3 × 3 after their branch points.
    *_, last = tiles((1.0, 1.0), halo=2).all_steps(IMAGES)
    assert torch.allclose(last, outputs.mean(dim=1), atol=1e-5)
    *_, cropped = tiles((1.0, 1.0), halo=0).all_steps(IMAGES)
    assert not torch.allclose(cropped, outputs.mean(dim=1), atol=1e-3)


def test_stages_that_a_later_exit_shares_with_the_others_run_on_its_tiles():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = layers(3, 4, 4, 4)
    network = nf.fission(
        model, 3, stages=["0", "1", "2"], branch_after=[1, 2], grouping="copies", example_input=IMAGES
    ).eval()
    cascade = TileCascade(network, (1.0, 1.0), tile=4, halo=4, order=(1, 2, 0), rule=RULE)
    assert cascade.starts == [1, 1, 1]  # of later exits, that is before the second stage
    with torch.no_grad():
        outputs = network(IMAGES)
    assert torch.allclose(cascade.all_steps(IMAGES)[1], outputs[:, [1, 2]].mean(dim=1), atol=1e-5)


class Padding(nn.Module):
    """A network of stride 4, which pads images to a multiple of 32; its later stages see one position."""

    def __init__(self, *, pads: bool) -> None:
        super().__init__()
        self.pads = pads
        self.first = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU())
        self.third = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU())
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, images):
        height, width = images.shape[2:]
        if self.pads:
            images = torch.nn.functional.pad(images, (0, -width % 32, 0, -height % 32))
        maps = self.last(self.third(self.second(self.first(images))))
        return maps.repeat_interleave(4, 2).repeat_interleave(4, 3)[..., :height, :width]


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("linear", [False, True])
def test_tiles_begin_where_features_do(pads, linear):
    images = torch.randn(2, 3, 80, 16, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = Padding(pads=pads).eval()
    network = nf.fission(
        model,
        1 if linear else 2,
        grouping="channels",
        stages=["first", "second", "third"],
        branch_after=None if linear else [1],
        linear_exits=[1] if linear else None,
        example_input=images,
    ).eval()
    for tile, halo in ((16, 0), (16, 4)):
        cascade = TileCascade(network, (1.0,), tile=tile, halo=halo, order=(0, 1), rule=RULE)
        if linear and not pads:  # the edges of what is enlarged differ, in a tile and in the image
            assert cascade.all_steps(images)[-1].shape == (2, 3, 80, 16)
        elif not linear:
            with torch.no_grad():
                whole = network(images).mean(dim=1)
            assert torch.allclose(cascade.all_steps(images)[-1], whole, atol=1e-5)
    for tile, halo, name in ((2, 0, "tile"), (16, 6, "halo")):
        cascade = TileCascade(network, (1.0,), tile=tile, halo=halo, order=(0, 1), rule=RULE)
        with pytest.raises(
            ValueError, match=f"{name} must be a multiple of 4, got .*4 pixels apart|so many pix"
        ):
            cascade.run(images)


@given(quantiles=st.tuples(st.floats(0, 1), st.floats(0, 1)))
@settings(max_examples=8, deadline=None)
def test_each_tile_runs_the_exits_that_its_confidence_says(quantiles):
    steps = tiles((1.0, 1.0), halo=1).all_steps(IMAGES)
    tiling = Tiling(4, 1)
    confidence = [RULE.confidence(tiling.cut(step)) for step in steps[:2]]
    thresholds = [float(values.quantile(q)) for values, q in zip(confidence, quantiles, strict=True)]
    ran = (
        torch.stack([c <= t for c, t in zip(confidence, thresholds, strict=True)], 1).long().cumprod(1).sum(1)
    )
    output = tiles(thresholds, halo=1).run(IMAGES)
    assert output.exits_used.flatten().tolist() == (ran + 1).tolist()
    expected = torch.stack([tiling.cut(step) for step in steps])[ran, torch.arange(len(ran))]
    assert torch.allclose(tiling.cut(output.logits), expected, atol=1e-5)


def test_costs_are_those_of_the_cuts_that_run():
    order = (0, 2, 1)
    costs = tile_costs(NETWORK, IMAGES, tile=4, halo=2, order=order)
    assert costs.dense[0] == nf.exit_costs(NETWORK, IMAGES[:1], order).dense[0]
    path = NETWORK.exit_paths[2]
    features = NETWORK.stem(IMAGES[:1])
    for stage in NETWORK.exit_paths[0].stages[: NETWORK.branch_after[1]]:
        features = stage(features)
    assert costs.dense[1] == 12 * count_macs(path, features[..., :8, :8]).dense  # 3 · 4 tiles of 4 + 2 · 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile": 5}, "tile must be a divisor of height and width, 12 and 16, got 5; such as 2"),
        ({"tile": 0}, "tile must be a positive integer, got 0"),
        ({"halo": -1}, "halo must be an integer of at least 0, got -1"),
    ],
)
def test_tiles_that_an_image_does_not_have_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        tiles((0.5, 0.5), **settings).run(IMAGES)


def test_a_network_of_labels_has_no_tiles():
    model = nn.Sequential(*layers(3, 4, 4, 4)[:3], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    network = nf.fission(model, 2, example_input=IMAGES, grouping="copies").eval()
    message = r"network must be of maps of the images' height and width, .*, got outputs of shape \(1, 3\)"
    with pytest.raises(ValueError, match=f"^{message}$"):
        TileCascade(network, (0.5,), tile=4, order=(0, 1), rule=RULE).run(IMAGES)


@given(tile=st.sampled_from([1, 2, 4]), seed=st.integers(0, 10))
def test_tiles_are_cut_row_by_row(tile, seed):
    maps = torch.rand(2, 3, 4, 8, generator=torch.Generator().manual_seed(seed))
    found = Tiling(tile, 0).cut(maps)
    expected = [
        image[:, y : y + tile, x : x + tile]
        for image in maps
        for y in range(0, 4, tile)
        for x in range(0, 8, tile)
    ]
    assert torch.equal(found, torch.stack(expected))


@pytest.fixture
def _short_timing(monkeypatch):
    monkeypatch.setattr(timing, "IMAGES_PER_ROUND", {1: 1, 256: 2})
    monkeypatch.setattr(timing, "MIN_ROUNDS", 1)
    monkeypatch.setattr(timing, "MAX_ROUNDS", 1)
    monkeypatch.setattr(timing, "CURVE_TIMED", 1)
    monkeypatch.setattr(module, "_ALONE", 1)


@pytest.mark.usefixtures("_short_timing")
@pytest.mark.parametrize(
    ("task", "flags"), [("regression", []), ("segmentation", ["--tile", "4", "--halo", "2"])]
)
def test_the_command_measures_it_beside_the_exits(run_of, capsys, task, flags):
    run = run_of(task)
    assert main(["evaluate", str(run), "--cascade", "--max-accuracy-drop", "30", *flags]) == 0
    printed = capsys.readouterr().out
    record = json.loads((run / "cascade.json").read_text("utf-8"))
    rule = RunFolder(run).load_spec(any_task=True).find_task().early_exit()
    assert (record["rule"], record["measure"]) == (rule.name, rule.measure)
    assert f"{rule.measure} %" in printed and "wrote cascade.json, cascade.png and cascade.svg" in printed
    assert (record["tile"], record["halo"]) == ((4, 2) if flags else (None, 0))
    _, full, *exits, chosen = record["points"][:5]
    assert [point["kind"] for point in (full, *exits, chosen)] == ["ensemble", "exit", "exit", "chosen"]
    assert RunFolder(run).load_cascade().measure == rule.measure
    if task == "segmentation":
        evaluation = json.loads((run / "evaluation.json").read_text("utf-8"))
        assert full["accuracy"] == pytest.approx(evaluation["ensemble"]["mean_iou"])
        assert [e["accuracy"] for e in exits] == pytest.approx([e["mean_iou"] for e in evaluation["exits"]])
    assert 100 * chosen["accuracy_drop"] < 60 and chosen["macs"] <= full["macs"] * (3 if flags else 1)
    (run / "cascade.json").unlink()


@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        ("multilabel", "--rule margin", "--rule must be left out for a run of task=multilabel, got 'margin'"),
        ("segmentation", "--delta 0.1", "--delta must be left out for a run of task=segmentation, got 0.1"),
        ("segmentation", "--halo 2", "--halo must be left out unless tile is given, got 2"),
        (
            "segmentation",
            "--tile 3",
            "--tile must be a divisor of height and width, 8 and 8, got 3; such as 2",
        ),
    ],
)
def test_settings_without_a_meaning_are_refused(run_of, capsys, task, flags, message):
    assert main(["evaluate", str(run_of(task)), "--cascade", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_a_cascade_of_other_outputs_is_what_its_rule_says():
    thresholds = (0.02, 0.02)
    cascade = nf.Cascade(NETWORK, thresholds, order=(0, 2, 1), rule=RULE)
    output = cascade.run(IMAGES)
    with torch.no_grad():
        outputs = NETWORK(IMAGES)
    for image, (logits, used) in enumerate(zip(output.logits, output.exits_used.tolist(), strict=True)):
        so_far = [RULE.combined(outputs[[image]][:, [0, 2, 1][:k]]) for k in (1, 2, 3)]
        expected = next((k for k in (0, 1) if RULE.confidence(so_far[k]).item() > thresholds[k]), 2)
        assert used == expected + 1
        assert torch.allclose(logits, so_far[expected][0], atol=1e-5)
    assert math.isfinite(F.softmax(output.logits, dim=1).sum().item())
