"""Fine-tuning for other tasks than classification: single network, ensemble, and what was gained."""

from dataclasses import replace

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

from netfission.config import FINETUNE_RECIPE, RunConfig
from netfission.data.mask_folders import VOID
from netfission.evaluation.resampling import resampled_errors
from netfission.network import LinearMapExit
from netfission.profiling.timing import Quartiles
from netfission.runs.finetune import finetune
from netfission.runs.finetune_settings import plan_finetuning
from netfission.runs.folder import RunFolder
from netfission.tasks import find_task, task_kind
from netfission.tasks.gain import TargetFigures, TargetGain
from netfission.tasks.gaussians import moments

OTHERS = ["multilabel", "regression", "segmentation"]
NAMES = ["red", "blue"]


@pytest.fixture
def plan_for(settings_for):
    """Task, folder and changes → the plan of a fine-tuning of seconds."""

    def plan(task, out, recipe=FINETUNE_RECIPE, **changes):
        defaults, fixed = RunConfig().to_dict(), {"task": task, "epochs": 1, "pretrained": False}
        begun = settings_for(task).to_dict()
        own = ("exits", "grouping")  # of the ensemble
        given = {name: begun[name] for name in begun if begun[name] != defaults[name] and name not in own}
        single = RunFolder(out).single.path
        return plan_finetuning(given | fixed | changes, single, recipe=recipe, ensemble_epochs=1)

    return plan


@pytest.fixture
def untimed(monkeypatch):
    """Networks are not timed, which takes long."""
    ratio = Quartiles(1.0, 1.1, 1.2)
    monkeypatch.setattr("netfission.runs.finetune._relative_times", lambda *_: {1: ratio})


@pytest.mark.parametrize("task", OTHERS)
def test_an_ensemble_is_made_and_compared(task, plan_for, tmp_path, untimed, monkeypatch):
    out = tmp_path / "run"
    plan = plan_for(task, out)
    gain = finetune(plan, out, progress=False, say=lambda _: None)
    folder, single = RunFolder(out), RunFolder(out).single
    spec = folder.load_spec(any_task=True)
    network, _ = folder.load_fission(any_task=True)
    assert (spec.task, network.exits, network.linear) == (task, 3, 2)
    assert single.load_fission(any_task=True)[0].exits == 1
    config = folder.load_config()
    assert config.training.parent_weight == 1 and config.fission.reconstruct
    assert config.model.weights == str(single.path)
    for figures, run in ((gain.ensemble, folder), (gain.single, single)):
        assert figures.metrics == run.load_target_evaluation(spec).calibrated
    assert (gain.n, gain.task) == (20, task)
    kind = task_kind(task)
    assert next(iter(gain.columns)) == kind.headline
    assert {kind.headline, "nll"} <= gain.errors.keys() <= kind.columns.keys()
    title = kind.columns[kind.headline].title.removesuffix(" %")
    assert f"not clear from 20 test images: {title} " in gain.summary()
    assert folder.shown_together() == [folder, single]
    assert folder.load_target_gain() == gain

    def refuse(*_, **__):
        raise AssertionError("a finished step is repeated")

    for step in ("train", "measure_gain"):
        monkeypatch.setattr(f"netfission.runs.finetune.{step}", refuse)
    assert finetune(plan, out, progress=False, say=lambda _: None) == gain
    calibration = single.load_calibration_of(single.load_spec(any_task=True))
    single.calibration.write_text(replace(calibration, n=19).to_json())
    assert folder.current_gain() is None


def examples(task, n=40):
    """A task, outputs `(n, 3, …)` of three exits, and targets."""
    generator = torch.Generator().manual_seed(0)
    size = (4, 5) if task == "segmentation" else ()
    found = find_task(task, NAMES)
    outputs = torch.randn(n, 3, found.outputs, *size, generator=generator)
    targets = {
        "multilabel": lambda: torch.randint(2, (n, 2), generator=generator).float(),
        "regression": lambda: torch.randn(n, 2, generator=generator),
        "segmentation": lambda: torch.randint(2, (n, 4, 5), generator=generator),
    }[task]()
    if task == "segmentation":
        outputs[:, :, 1] += 2.0 * targets.unsqueeze(1)
        targets[:, 0] = VOID
        targets[3] = VOID
    return found, outputs, targets


@pytest.mark.parametrize("task", OTHERS)
def test_a_set_of_all_images_has_their_measures(task):
    found, outputs, targets = examples(task)
    outputs[:5] = outputs[5:10]  # equal predictions
    known = {"average": "logits", "calibration": found.calibrate(outputs, targets, average="logits")}
    resampler = found.resampler(**known)
    for rows in torch.arange(40).split(16):
        resampler.add(outputs[rows], targets[rows])
    chosen = torch.randint(40, (40,), generator=torch.Generator().manual_seed(1))
    rows = torch.stack([torch.arange(40), chosen])
    weights = torch.stack([row.bincount(minlength=40) for row in rows]).double()
    measures = resampler.result()(weights)
    for number, row in enumerate(rows):
        expected = found.evaluate(outputs[row], targets[row], **known).calibrated
        assert measures.keys() == expected.keys() - {"coverage", "width"}
        for name, values in measures.items():
            tolerance = 5e-3 if name in ("error_auroc", "aurc") else 1e-6  # of fewer levels of confidence
            assert values[number].item() == pytest.approx(expected[name], abs=tolerance), name


def test_the_error_of_a_mean_is_that_of_the_differences():
    before, after = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)).double()
    errors = resampled_errors(
        lambda weights: {"mae": weights @ before / 300, "lost": weights[:, 0] * torch.nan},
        lambda weights: {"mae": weights @ after / 300, "lost": weights[:, 0]},
        300,
    )
    assert errors == {"mae": pytest.approx((after - before).std().item() / 300**0.5, rel=0.1)}


@pytest.mark.parametrize("task", OTHERS)
def test_another_network_teaches_by_its_divergence(task):
    found, outputs, targets = examples(task)
    teacher = outputs.flip(0)[:, :1].clone().requires_grad_()
    loss = found.distil(outputs.requires_grad_(), teacher, targets, 2.0)
    if task == "regression":
        (mean, variance), (of_teacher, spread) = moments(outputs), moments(teacher)
        normals = Normal(of_teacher, spread.sqrt()), Normal(mean, variance.sqrt())
        expected = kl_divergence(*normals).mean(dim=(0, 2))
    elif task == "multilabel":
        labels = [Bernoulli(logits=values.expand_as(outputs) / 2) for values in (teacher, outputs)]
        divergence = kl_divergence(*labels)
        expected = 4 * divergence.mean(dim=(0, 2))
    else:
        last = [Categorical(logits=maps.movedim(2, -1) / 2) for maps in (teacher, outputs)]
        expected = 4 * kl_divergence(*last).movedim(1, -1)[targets != VOID].mean(dim=0)
    torch.testing.assert_close(loss, expected.sum())
    loss.backward()
    assert teacher.grad is None and outputs.grad.isfinite().all()


def test_what_got_worse_is_said():
    single = TargetFigures(1, {"mae": 0.5, "nll": 0.7, "rmse": 1.0}, 10, 10)
    ensemble = TargetFigures(3, {"mae": 0.6, "nll": 0.6, "rmse": 1.0}, 10, 10)
    errors = {"mae": 0.04, "nll": 0.04, "rmse": 0.1}
    lines = TargetGain("regression", 100, single, ensemble, {}, {}, errors).summary().splitlines()
    assert [line.partition(" (")[0] for line in lines[:3]] == [
        "better than the single network: NLL -0.100",
        "worse than the single network: MAE +0.1000",
        "as the single network: RMSE +0.0000",
    ]
    figures = (TargetFigures(exits, {"mean_iou": value}, 1, 1) for exits, value in ((1, 0.5), (3, 0.6)))
    gain = TargetGain("segmentation", 100, *figures, {}, {}, {"mean_iou": 0.01})
    assert "better than the single network: mIoU +10.00 points (standard error 1.00)" in gain.summary()


def test_what_a_task_does_not_have_is_no_part_of_a_recipe(plan_for, run_of, tmp_path):
    out = tmp_path / "run"
    data = plan_for("segmentation", out, recipe="finetune").single.data
    assert (data.label_smoothing, data.rand_augment, data.crop_scale) == (0, None, 0.5)
    with pytest.raises(ValueError, match=r"^finetuned must be a network of task=segm.*, got .*ression$"):
        plan_finetuning({"task": "segmentation"}, out / "single", finetuned=str(run_of("regression")))
    with pytest.raises(ValueError, match="mix must be 'none' with task=multilabel"):
        plan_for("multilabel", out, mix="cutmix")


def test_linear_exits_of_maps_are_fitted_to_what_the_network_predicts():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 4, 3, 5, generator=generator), torch.randn(60, 2, 6, 10, generator=generator)
    images = torch.zeros(60, 3, 12, 20)
    wanted, exit_ = (LinearMapExit(features, 3, images) for _ in range(2))
    with torch.no_grad():
        logits = wanted(features)
        before = (exit_(features) - logits).square().mean()
        exit_.fit(exit_.pooled(features), logits)
        assert (exit_(features) - logits).square().mean() < 0.1 * before
