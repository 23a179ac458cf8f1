"""A trained network with all that is needed to use it on images, saved and loaded as one."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from operator import index
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from netfission.classifier.folder import (
    Factory,
    ModelFolder,
    NetworkSpec,
    WeightsError,
    figures_json,
    network_state,
    state_sha256,
)
from netfission.classifier.hub import upload
from netfission.classifier.image_network import ImageNetwork, find_folder
from netfission.classifier.model_card import model_card
from netfission.classifier.predictions import AnswerLimits, Predictions
from netfission.config import DEFAULT_RISK, RunConfig
from netfission.evaluation import Evaluation
from netfission.evaluation.calibration import Calibration
from netfission.evaluation.conformal import SetScore
from netfission.evaluation.drift import drift_p_value
from netfission.evaluation.guarantees import CalibrationScores
from netfission.evaluation.p_values import DEFAULT_DETECTOR, Detector, DetectorScore
from netfission.network import FissionNetwork, check_network
from netfission.utils.checksums import stamp_json
from netfission.utils.errors import first_line, invalid
from netfission.utils.files import has_file

T = TypeVar("T")


class Classifier(ImageNetwork):
    """A trained network with the names of its classes and the preparation of its images.

    `from_pretrained` reads the folder of a run, a folder that `save_pretrained` wrote, or a repository of
    the Hugging Face hub; `save_pretrained` and `push_to_hub` write one. Weights are safetensors and settings
    JSON: no pickle is read, and no code is run but this project's and your own `factory`.

    Attributes:
        network: normalised images → logits `(batch, exits, classes)`.
        spec: the description of the network.
        calibration: temperature and risk–coverage curve; None if there were no images to calibrate on.
        evaluation: metrics on a test split; None if it was not evaluated.
        recipe: the settings it was trained with; None if they are not known.

    Example:
        >>> import tempfile
        >>> import netfission as nf
        >>> from PIL import Image
        >>> from netfission.models import create_model
        >>> net = nf.fission(create_model("wrn-10-1", 2), exits=2, example_input=torch.zeros(1, 3, 8, 8))
        >>> classifier = nf.Classifier.from_network(
        ...     net, model="wrn-10-1", classes=["cat", "dog"], shape=(3, 8, 8), mean=[0.5] * 3, std=[0.2] * 3
        ... )
        >>> pixels = torch.stack([classifier.pixels(Image.new("L", (20, 30)))])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = classifier.save_pretrained(folder)
        ...     again = nf.Classifier.from_pretrained(folder)
        >>> torch.equal(again.logits(pixels), classifier.logits(pixels))
        True
        >>> again.predict(pixels).exit_probabilities.shape
        torch.Size([1, 2, 2])
    """

    def __init__(
        self,
        network: nn.Module,
        spec: NetworkSpec,
        calibration: Calibration | None = None,
        evaluation: Evaluation | None = None,
        recipe: RunConfig | None = None,
    ) -> None:
        super().__init__(network, spec, calibration)
        self.calibration: Calibration | None
        self.evaluation = evaluation
        self.recipe = recipe

    @classmethod
    def from_network(
        cls,
        network: FissionNetwork,
        *,
        model: str | None,
        classes: Sequence[str],
        shape: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> Self:
        """Describe a network that you fissioned and trained in your own code, and put it into eval mode.

        Args:
            network: what `fission` returned, trained.
            model: the name from which `netfission.models.create_model` makes the single network; None if
                a factory of your own made it, which `from_pretrained` then needs.
            classes: names of the classes, all different, in the order of the logits.
            shape: channels (1 or 3), height and width of the training images.
            mean: per channel, on the scale [0, 1]; subtracted from images before the network.
            std: per channel, on the same scale; images are divided by it.

        Raises:
            ValueError: the network was made with a `Grouping` object or is not of float32, it differs from
                what `model` makes, or an argument is not valid.
        """
        check_network("network", network)
        if network.config is None:
            raise invalid(
                "network", "made with a grouping given by its name", found="one made with a Grouping object"
            )
        dtype = next(network.parameters()).dtype
        if dtype != torch.float32:
            found = f"weights of {str(dtype).removeprefix('torch.')}"
            raise invalid(
                "network", "of float32, as it is loaded again", found=found, hint="call float() first"
            )
        spec = NetworkSpec(
            model,
            list(classes),
            _numbers("shape", shape, index),
            _numbers("mean", mean, float),
            _numbers("std", std, float),
            asdict(network.config),
            version("netfission"),
        )
        classifier = cls(network, spec)
        noise = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (2, *spec.shape), dtype=torch.uint8, generator=noise)
        try:
            logits = classifier.logits(pixels)
        except RuntimeError as error:
            found = f"{spec.shape} ({first_line(error)})"
            raise invalid("shape", "the shape of the network's images", found=found) from error
        if logits.shape[2] != len(spec.classes):
            raise invalid("classes", f"{logits.shape[2]} names, one per logit", found=str(len(spec.classes)))
        if model is not None:
            _check_model(classifier, model, pixels, logits)
        return classifier

    @property
    def temperature(self) -> float:
        """The number that logits are divided by; 1 without calibration."""
        return 1.0 if self.calibration is None else self.calibration.temperature

    @property
    def default_risk(self) -> float | None:
        """The risk at which `netfission predict` and `serve` abstain: 0.05; None without calibration."""
        return None if self.calibration is None else DEFAULT_RISK

    def predict(
        self,
        pixels: Tensor,
        *,
        risk: float | None = None,
        delta: float | None = None,
        coverage: float | None = None,
        score: SetScore = "lac",
        class_wise: bool = False,
        accept_false_alarms: float | None = None,
        detector: DetectorScore | None = None,
    ) -> Predictions:
        """Predict the classes of images, with calibrated probabilities.

        Args:
            pixels: uint8 `(n, channels, height, width)`, see `pixels`.
            risk: accepted share of wrong answers, in [0, 1]. The ensemble abstains below the confidence that
                keeps to it on the images of its calibration. Default: it never abstains.
            delta: see `limits`, as the following.
            coverage: least share of the images whose prediction set contains the label.
            score: by which classes enter a set.
            class_wise: whether the coverage is to hold for each class.
            accept_false_alarms: share of images like those of the calibration that may be marked as out of
                distribution.
            detector: score that the p-values are of.

        Raises:
            ValueError: `pixels` is not valid, or see `limits`.
        """
        limits = self.limits(
            risk=risk,
            delta=delta,
            coverage=coverage,
            score=score,
            class_wise=class_wise,
            accept_false_alarms=accept_false_alarms,
            detector=detector,
        )
        return self.predict_within(pixels, limits)

    def predict_within(self, pixels: Tensor, limits: AnswerLimits) -> Predictions:
        """Predict the classes of images as `predict` does, with limits that were computed before.

        Args:
            pixels: uint8 `(n, channels, height, width)`, see `pixels`.
            limits: what `limits` returned.

        Raises:
            ValueError: `pixels` is not valid.
        """
        self.check_pixels(pixels)
        return self.interpret(self.logits(pixels), limits)

    def interpret(self, logits: Tensor, limits: AnswerLimits) -> Predictions:
        """Return the predictions of images from their logits.

        Args:
            logits: `(n, exits, classes)`, what `logits` returned.
            limits: what `limits` returned.
        """
        return Predictions.from_logits(logits, self.temperature, limits, average=self.spec.average)

    def drift_p_value(self, pixels: Tensor, *, detector: DetectorScore = DEFAULT_DETECTOR) -> float:
        """Test whether a batch of images comes from the distribution of those of the calibration.

        If it does, and its images are drawn independently, the p-value is at most α with a probability of at
        most α, see `netfission.evaluation.drift.drift_p_value`.

        Args:
            pixels: uint8 `(n, channels, height, width)`, see `pixels`.
            detector: score by which the images are compared, see `limits`.

        Returns:
            The p-value, in [0, 1].

        Raises:
            ValueError: `pixels` is not valid or empty, or the calibration has no scores of images.
        """
        self.check_pixels(pixels)
        if not len(pixels):
            raise invalid("pixels", "at least one image", found="none")
        found = self._scores("detector", detector, uncertainty=True).detector(detector)
        scores = found.scores(self.logits(pixels), average=self.spec.average)
        return drift_p_value(scores, found.calibration)

    def limits(
        self,
        *,
        risk: float | None = None,
        delta: float | None = None,
        coverage: float | None = None,
        score: SetScore = "lac",
        class_wise: bool = False,
        accept_false_alarms: float | None = None,
        detector: DetectorScore | None = None,
    ) -> AnswerLimits:
        """Compute from the calibration what keeps answers to a risk, sets to a coverage, alarms to a rate.

        The promises hold for images of the same distribution as those of the calibration; each by itself.

        Args:
            risk: accepted share of wrong answers, in [0, 1]; with `delta` in (0, 1). Default: the ensemble
                never abstains.
            delta: probability, over the choice of the images of the calibration, that more of the answers
                are wrong than `risk` (learn then test, Angelopoulos et al. 2021, arXiv 2110.01052), and that
                fewer sets contain the label than `coverage`, and that more images are marked than
                `accept_false_alarms`; in (0, 1). Default: the risk is that on the images of the calibration,
                without a bound, and the other two are means over their choice.
            coverage: least share of the images whose prediction set contains the label, in (0, 1), by split
                conformal prediction. Default: no sets.
            score: by which classes enter a set: `lac`, `aps` or `raps`, see
                `netfission.evaluation.conformal.class_scores`.
            class_wise: whether the coverage is to hold for the images of each class; with `delta`, for each
                class by itself.
            accept_false_alarms: share of images like those of the calibration that may be marked as out of
                distribution, in (0, 1). Default: no image is marked.
            detector: score that the p-values are of: `energy`, `entropy`, `maximum-probability` or
                `mutual-information`, see `netfission.evaluation.out_of_distribution.uncertainty_scores`.
                Default: `energy` if the calibration has it, else there are no p-values.

        Warns:
            UserWarning: some classes have too few images for `class_wise`; they are in every set.

        Raises:
            ValueError: an argument is not valid, there is no calibration, it was made on images that the
                network was chosen on, or on too few; the message says how many are enough.

        Example:
            >>> import netfission as nf
            >>> from netfission.models import create_model
            >>> net = nf.fission(create_model("wrn-10-1", 2), exits=2, example_input=torch.zeros(1, 3, 8, 8))
            >>> labels = torch.tensor([0, 1] * 50)
            >>> logits = 4 * torch.eye(2)[labels].unsqueeze(1)  # of images that are all classified correctly
            >>> classifier = nf.Classifier.from_network(
            ...     net, model=None, classes=["cat", "dog"], shape=(3, 8, 8), mean=[0.5] * 3, std=[0.2] * 3
            ... )
            >>> classifier.calibration = Calibration.fit(logits, labels, average="logits")
            >>> limits = classifier.limits(risk=0.05, delta=0.1, coverage=0.9)
            >>> limits.threshold, [round(quantile, 3) for quantile in limits.quantiles]
            (0.0, [0.018, 0.018])
        """
        for name, value, default in (("score", score, "lac"), ("class_wise", class_wise, False)):
            if coverage is None and value != default:
                raise invalid(name, "left out without a coverage", value)
        if delta is not None and coverage is None:
            self._scores("delta", delta)
        if delta is not None and risk is None and coverage is None and accept_false_alarms is None:
            raise invalid("delta", "left out without a risk, a coverage or a rate of alarms to bound", delta)
        threshold = (
            self.threshold(risk)
            if risk is None or delta is None
            else self._scores("delta", delta).threshold(risk, delta)
        )
        quantiles = (
            []
            if coverage is None
            else self._scores("coverage", coverage).quantiles(
                coverage, score, self.spec.classes, delta=delta, class_wise=class_wise
            )
        )
        return AnswerLimits(
            risk,
            delta,
            threshold,
            coverage,
            score,
            quantiles,
            class_wise,
            accept_false_alarms,
            self._detector(accept_false_alarms, delta, detector),
        )

    def _detector(
        self, accept_false_alarms: float | None, delta: float | None, score: DetectorScore | None
    ) -> Detector | None:
        """Return the detector; None if nothing asks for it and the calibration has no scores for it."""
        if accept_false_alarms is not None:
            scores = self._scores("accept_false_alarms", accept_false_alarms, uncertainty=True)
        elif score is not None:
            scores = self._scores("detector", score, uncertainty=True)
        elif (
            self.calibration is None
            or self.calibration.scores is None
            or not self.calibration.scores.uncertainty
        ):
            return None
        else:
            scores = self.calibration.scores
        return scores.detector(
            DEFAULT_DETECTOR if score is None else score,
            accept_false_alarms=accept_false_alarms,
            delta=delta,
        )

    def _scores(self, argument: str, value: float | str, *, uncertainty: bool = False) -> CalibrationScores:
        """Return the scores of the images of the calibration; refuse the argument that needs them."""
        if self.calibration is None:
            hint = "calibrate it on images that it was neither trained nor chosen on"
            raise invalid(argument, "left out for a network without calibration", value, hint=hint)
        scores = self.calibration.scores
        if scores is None or (uncertainty and not scores.uncertainty):
            expected = "left out for a calibration without scores of images"
            hint = "it is of an earlier version: calibrate again, for a run with `netfission calibrate RUN`"
            if dependence := self.calibration.dependence:
                hint = f"{dependence}: calibrate on others with `netfission calibrate RUN --data OTHER`"
            raise invalid(argument, expected, value, hint=hint)
        return scores

    def threshold(self, risk: float | None) -> float | None:
        """Return the confidence below which `predict` abstains; None if `risk` is None.

        Raises:
            ValueError: `risk` is outside [0, 1], or there is no calibration.
        """
        if risk is None:
            return None
        if self.calibration is None:
            raise invalid(
                "risk",
                "left out for a network without calibration",
                risk,
                hint="calibrate it, or train with validation above 0",
            )
        return self.calibration.risk_coverage.threshold(risk)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        factory: Factory | None = None,
    ) -> Self:
        """Load a network, on the CPU, in eval mode; its logits are those of the saved one, bit for bit.

        Args:
            name: the folder of a run, a folder that `save_pretrained` wrote, or a repository of the hub.
            revision: branch, tag or commit of the repository; default its main branch.
            token: token of the hub; default the one kept by `hf auth login`.
            factory: makes the single network, if it has no name; called with the keyword arguments
                `num_classes` and `in_channels`.

        Raises:
            ValueError: a file is missing, damaged or of a newer version, or the factory's network differs.
            ConnectionError: the hub cannot be reached.
        """
        folder = find_folder(name, revision=revision, token=token)
        network, spec = folder.load_network(factory)
        recipe = folder.load_config() if has_file(folder.config) else None
        digest = cache(folder.weights_sha256)  # once for all files
        return cls(network, spec, folder.load_calibration(digest), folder.load_evaluation(digest), recipe)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **settings: Any,
    ) -> str | None:
        """Write the network's files into a folder, in place of those of a network that it held before.

        All files are on disk before the first gets its name, so that nothing changes if the disk is full.
        A README that exists stays; a warning says so if it describes another network.

        Args:
            save_directory: the folder; made if it does not exist.
            push_to_hub: whether to push the network to the hub as well.
            repo_id: see `push_to_hub`; default the folder's name.
            **settings: of `push_to_hub`.

        Returns:
            The address of the commit on the hub, if the network was pushed.

        Raises:
            ValueError: the folder is that of a run, the calibration is of other weights, as before further
                training; or see `push_to_hub`.
            OSError: it cannot be written.
            ConnectionError: see `push_to_hub`.
        """
        self.write_files(save_directory)
        return self.push_to_hub(repo_id or Path(save_directory).name, **settings) if push_to_hub else None

    def files(self, folder: ModelFolder) -> dict[Path, str | bytes]:
        """Return the content of the network's files in a folder, by path; see `save_pretrained`."""
        files = super().files(folder)
        if self.evaluation is not None:
            digest = state_sha256(network_state(self.network))
            files[folder.evaluation] = stamp_json(figures_json(self.evaluation, digest))
        return files | self._readme(folder.readme)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Push a network of netfission",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Write the network's files into a repository of the hub, which is made if it does not exist.

        Args:
            repo_id: name of the repository, `OWNER/NAME`.
            commit_message: message of the commit.
            private: whether a new repository is private; default the owner's setting.
            token: token of the hub; default the one kept by `hf auth login`.
            branch: branch to commit to; default the main branch.
            create_pr: whether to open a pull request in place of committing to the branch.

        Returns:
            The address of the commit.

        Raises:
            ValueError: the hub refuses it: the name is not valid, or you may not write there.
            ConnectionError: the hub cannot be reached.
        """
        return upload(
            self.save_pretrained,
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            branch=branch,
            create_pr=create_pr,
        )

    def _readme(self, path: Path) -> dict[Path, str]:
        """Return the README by its path, or {} if there is one; warn if that describes another network."""
        text = model_card(self.spec, self.calibration, self.evaluation, self.recipe)
        if not path.exists():
            return {path: text}
        if path.read_bytes() != text.encode():
            warnings.warn(
                f"{path} stays as it is; remove it to have one of this network written", stacklevel=5
            )
        return {}


def _numbers(name: str, values: Sequence[Any], convert: Callable[[Any], T]) -> list[T]:
    try:
        return [convert(value) for value in values]
    except (TypeError, ValueError) as error:
        raise invalid(name, "a list of numbers", values) from error


def _check_model(classifier: Classifier, model: str, pixels: Tensor, logits: Tensor) -> None:
    """Refuse a name that makes another network than the one that gave these logits."""
    state = network_state(classifier.network)
    try:
        restored = Classifier(classifier.spec.restore(state), classifier.spec)
        spread = (logits.amax(dim=2) - logits.amin(dim=2)).max()
        if not (restored.logits(pixels) - logits).abs().max() <= 1e-2 * spread:
            raise WeightsError("its logits differ")
    except WeightsError as error:
        raise invalid(
            "model",
            "the name that makes this network",
            found=f"{model!r}, which makes another ({error})",
            hint="pass its name, or None and a factory when you load it",
        ) from error
