"""Evaluation of a finished run of maps on test photographs in their own sizes, window by window."""

import math
from dataclasses import replace
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from netfission.classifier import Predictor
from netfission.classifier.folder import figures_json
from netfission.config import RunConfig
from netfission.inference.windows import OVERLAP
from netfission.runs.evaluate import EVALUATION_BATCH, load_matching_data, readable_calibration
from netfission.runs.folder import RunFolder
from netfission.runs.setup import run_device
from netfission.tasks.window_evaluation import WindowEvaluation
from netfission.utils.files import write_json


class WindowCounter(Protocol):
    """Is told how far an evaluation is."""

    def __call__(self, done: int, total: int) -> object:
        """Take the number of windows of a photograph so far, and of all of its windows."""

    def photographs(self, total: int) -> object:
        """Take the number of photographs."""

    def next_photograph(self) -> object:
        """Take note that a photograph is done."""


def evaluate_windows(
    folder: RunFolder,
    config: RunConfig,
    window: tuple[int, int],
    overlap: float = OVERLAP,
    *,
    progress: WindowCounter | None = None,
) -> WindowEvaluation:
    """Measure the maps of a run on the test photographs in their own sizes, and write the figures.

    They are predicted window by window, see `netfission.classifier.Predictor.predict_windows`, and for
    comparison scaled to the network's size, as without windows. The temperature is that of the run. The file
    is `RunFolder.window_evaluation`; all others stay as they are.

    Args:
        folder: folder of a finished run.
        config: the run's settings.
        window: height and width of a window.
        overlap: see `netfission.inference.windows.Windows`.
        progress: is told how far it is; default nobody is.

    Raises:
        ValueError: the run is of a task without maps, its network does not take such windows, or see
            `netfission.runs.evaluate.evaluate`.
    """
    predictor = Predictor.from_folder(folder)
    task, spec = predictor.task, predictor.spec
    windows = predictor.to(run_device(config.training)).windows(window, overlap)
    calibration = readable_calibration(folder)
    if calibration is not None and calibration.overlap:
        calibration = predictor.calibration = None
    data, photographs = task.load_unscaled(config.data, config.fission.seed)
    load_matching_data(folder, config, spec, data)
    evaluator: Any = task.evaluator(average=spec.average, calibration=calibration)
    scores, count = task.map_scores(), 0
    if progress is not None:
        progress.photographs(len(photographs))
    for row in range(len(photographs)):
        pixels, mask = photographs[row]
        count += windows.count((mask.shape[0], mask.shape[1]))
        top = 0
        for strip in predictor.strips(pixels, windows, batch_size=EVALUATION_BATCH, progress=progress):
            evaluator.add(strip, mask[None, top : top + strip.shape[-2]])
            top += strip.shape[-2]
        scores.add(_scaled(predictor, pixels), mask)
        if progress is not None:
            progress.next_photograph()
    evaluation, _ = evaluator.result()
    found = WindowEvaluation(
        window=list(windows.size),
        overlap=windows.overlap,
        windows=count,
        evaluation=replace(evaluation, n=len(photographs)),
        shape=spec.shape[1:],
        scaled={name: value for name, value in scores.result().items() if not math.isnan(value)},
    )
    write_json(folder.window_evaluation, figures_json(found, folder.weights_sha256()))
    return found


@torch.no_grad()
def _scaled(predictor: Predictor, pixels: Tensor) -> Tensor:
    """Return the probabilities of a photograph that is scaled to the network's size, and back to its own.

    Args:
        predictor: the network.
        pixels: `(channels, height, width)`.

    Returns:
        `(classes, height, width)`.
    """
    channels = pixels.permute(1, 2, 0).numpy()
    image = Image.fromarray(channels[:, :, 0] if channels.shape[2] == 1 else channels)
    size = pixels.shape[1], pixels.shape[2]
    predictions = predictor.predict(predictor.pixels(image)[None], sizes=[size])
    probabilities: Tensor = predictions.probabilities(0)
    return probabilities
