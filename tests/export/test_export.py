"""An exported file gives what the classifier gives, or it is not written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import netfission as nf
from netfission.classifier.answer_settings import AnswerSettings
from netfission.classifier.folder import NetworkSpec
from netfission.data import load_data
from netfission.data.splits import TensorSplit
from netfission.evaluation.calibration import Calibration
from netfission.export import export, export_reduced
from netfission.export.check import check_outputs
from netfission.export.predictor import OUTPUTS, PROMISED
from netfission.methods.registry import METHODS
from netfission.models import create_model
from netfission.runs.setup import build_network, load_run_data, network_spec

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SHAPE = (3, 16, 16)
LIMITS = {"coverage": 0.8, "risk": 0.3, "delta": 0.2, "accept_false_alarms": 0.1}


def pixels(n: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, *(shape or SHAPE)), generator=generator, dtype=torch.uint8)


def run_file(path: Path, images: Tensor) -> dict[str, Tensor]:
    """What a file gives, by its format's own runtime and nothing of this project."""
    if path.suffix == ".pt2":
        outputs: dict[str, Tensor] = torch.export.load(str(path)).module()(images)
        return outputs
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    arrays = session.run(names, {"images": images.numpy()})
    return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}


def metadata(path: Path) -> dict:
    if path.suffix == ".pt2":
        extra = {"netfission.json": ""}
        torch.export.load(str(path), extra_files=extra)
        return json.loads(extra["netfission.json"])
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return json.loads(session.get_modelmeta().custom_metadata_map["netfission"])


def assert_gives_what_is_predicted(path: Path, classifier: nf.Classifier, images: Tensor) -> None:
    for some in (images[:1], images[1:3], images):
        found, expected = run_file(path, some), classifier.predict(some)
        assert list(found) == list(OUTPUTS)
        for name in OUTPUTS:
            wanted = getattr(expected, name)
            assert found[name].dtype == wanted.dtype, name
            torch.testing.assert_close(
                found[name], wanted, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


@pytest.fixture(scope="module", params=["onnx", "pt2"])
def exported(request, finished_run, digits, tmp_path_factory) -> tuple[Path, nf.Classifier]:
    path = tmp_path_factory.mktemp("exported") / f"model.{request.param}"
    classifier = nf.Classifier.from_pretrained(finished_run)
    export(classifier, path, digits.validation.images[:20], format=request.param)
    return path, classifier


def test_every_output_is_what_is_predicted_for_any_batch_size(exported, digits) -> None:
    path, classifier = exported
    assert classifier.temperature != 1  # else leaving it out would not be seen
    assert_gives_what_is_predicted(path, classifier, digits.test.images[:40])


def test_the_metadata_say_how_to_use_it(exported) -> None:
    path, classifier = exported
    about = metadata(path)
    assert about["classes"] == list("0123456789")
    assert list(about["outputs"]) == list(OUTPUTS)
    preprocessing = about["preprocessing"]
    assert (preprocessing["mode"], preprocessing["height"], preprocessing["width"]) == ("L", 8, 8)
    assert (preprocessing["mean"], preprocessing["std"]) == (classifier.spec.mean, classifier.spec.std)
    assert about["temperature"] == classifier.temperature
    assert about["risk_coverage"]["risk"] == classifier.calibration.risk_coverage.risk
    assert about["checked"]["images"] == 20 and about["checked"]["difference"] <= 1e-4


def test_a_pt2_file_holds_no_masks(exported) -> None:
    path, classifier = exported
    assert any(name.endswith("_removed") for name in classifier.network.state_dict())
    if path.suffix == ".pt2":  # of ONNX, what nothing reads is left out anyway
        program = torch.export.load(str(path))
        assert not any("removed" in name for name in (*program.state_dict, *program.constants))


def test_no_path_of_this_machine_is_in_the_file(exported) -> None:
    path, _ = exported
    content = path.read_bytes()
    assert b"netfission" in content
    for part in (torch.__file__, nf.__file__, __file__):
        assert str(Path(part).parent).encode() not in content


def classifier_of(network: nn.Module, side: int = 16) -> nf.Classifier:
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
    return nf.Classifier.from_network(
        network, model=None, classes=["a", "b", "c"], shape=(3, side, side), mean=mean, std=std
    )


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_network_of_channels_is_exported_and_left_as_it_is(format: str, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        single = create_model("wrn-10-1", 3)
    example = torch.zeros(2, *SHAPE)
    net = nf.fission(single, 2, grouping="channels", example_input=example).eval()
    classifier, before = classifier_of(net), {name: t.clone() for name, t in net.state_dict().items()}
    export(classifier, tmp_path / f"model.{format}", pixels(3), format=format)
    assert_gives_what_is_predicted(tmp_path / f"model.{format}", classifier, pixels(4, seed=1))
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


# These make the same kind of network as snapshot, edst-ensemble, and fission by weights, with linear exits
# and with one exit, which are exported.
SAME_NETWORK = {"fge", "dst-ensemble", "neurotrails", "treenet", "multi-exit", "born-again"}


@pytest.mark.parametrize(
    "method", sorted(METHODS.keys() - {"fission", "lora-ensemble", "singular-value-ensemble"} - SAME_NETWORK)
)
def test_baselines(method: str, settings_of, tmp_path: Path) -> None:
    sparse = method == "edst-ensemble"
    config = settings_of(
        method=method,
        exits=2,
        sparsity=0.8 if sparse else 0.0,
        criterion="erk" if sparse else "snip",
    )
    data = load_run_data(config.data, 0)
    classifier = nf.Classifier(build_network(config, data), network_spec(config, data))
    export(classifier, tmp_path / "model.onnx", data.test.images[:3])
    assert_gives_what_is_predicted(tmp_path / "model.onnx", classifier, data.test.images[:5])


class Tiny(nn.Module):
    """Logits of two exits from mean colours, times a factor once exported."""

    def __init__(self, exported: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(18.0).view(2, 3, 3).sin())
        self.exported = exported

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.einsum("bi,eic->bec", images.mean(dim=(2, 3)), self.weight)
        # What data-dependent branches and random numbers do unasked: the file is of another network.
        return logits * (self.exported if torch.compiler.is_compiling() else 1)


def tiny(network: nn.Module) -> nf.Classifier:
    spec = NetworkSpec(None, ["a", "b", "c"], list(SHAPE), [0.5] * 3, [0.2] * 3, {}, "0")
    return nf.Classifier(network, spec)


@pytest.mark.parametrize("opset", [18, 23])
def test_the_opset_is_the_one_asked_for(opset: int, tmp_path: Path) -> None:
    export(tiny(Tiny()), tmp_path / "model.onnx", pixels(3), opset=opset)
    (entry,) = onnx.load(tmp_path / "model.onnx").opset_import
    assert entry.version == opset
    assert_gives_what_is_predicted(tmp_path / "model.onnx", tiny(Tiny()), pixels(5, seed=1))


# --- a file that is wrong ---------------------------------------------------------------------------


# Each format once: the comparison, and what is done about it, are the same.
@pytest.mark.parametrize(
    ("factor", "difference", "format"), [(1.01, r"0\.00\d+", "onnx"), (float("nan"), "nan", "pt2")]
)
def test_a_file_that_gives_other_probabilities_is_not_kept(
    factor: float, difference: str, format: str, tmp_path: Path
) -> None:
    path = tmp_path / f"model.{format}"
    path.write_bytes(b"as it was")
    with pytest.raises(
        RuntimeError,
        match=f"is discarded: its probabilities on 70 images differ by {difference} from PyTorch's; the "
        "tolerance is 0.0001",
    ):
        export(tiny(Tiny(factor)), path, pixels(70), format=format)
    assert path.read_bytes() == b"as it was"
    assert list(tmp_path.iterdir()) == [path]


class Untraceable(Tiny):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * (1 if images.mean() > 0 else 2)


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_network_that_cannot_be_exported_is_refused_in_one_line(format: str, tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"the network cannot be exported \(\w+: .*data-dependent"
    ) as caught:
        export(tiny(Untraceable()), tmp_path / "model", pixels(5), format=format)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_output_that_belies_the_probabilities_is_found() -> None:
    classifier, images = tiny(Tiny()), pixels(9)

    def run(images: Tensor) -> dict[str, Tensor]:
        predictions = classifier.predict(images)
        return {name: getattr(predictions, name) for name in OUTPUTS}

    assert check_outputs(run, classifier, images) == 0
    for name in set(OUTPUTS) - {"probabilities", "exit_probabilities"}:
        spoil = (
            (lambda value: (value + 1) % 3) if name in ("classes", "votes") else (lambda value: value + 0.1)
        )
        with pytest.raises(RuntimeError, match=f"is discarded: its {name} differ by"):
            check_outputs(
                lambda images, n=name, s=spoil: run(images) | {n: s(run(images)[n])}, classifier, images
            )


# --- fewer bits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "format"),
    [("fp16", "onnx"), pytest.param("fp16", "pt2", marks=pytest.mark.thorough), ("int8", "onnx")],
)
def test_fewer_bits_are_fewer_and_their_change_is_measured(
    precision: str, format: str, finished_run, digits, settings_of, tmp_path: Path
) -> None:
    data, path = load_run_data(settings_of().data, 3), tmp_path / f"model.{format}"
    classifier = nf.Classifier.from_pretrained(finished_run)
    asked = AnswerSettings(**LIMITS, detector="mutual-information")
    done = export_reduced(classifier, path, data, precision=precision, format=format, asked=asked)
    found, labels = run_file(path, data.validation.images), data.validation.labels
    expected = classifier.predict(data.validation.images)
    difference = (found["exit_probabilities"] - expected.exit_probabilities).abs().max().item()
    assert 1e-5 < difference < 0.2
    assert done.difference == pytest.approx(difference, rel=0.05)
    for at, probabilities in enumerate((expected.probabilities, found["probabilities"])):
        accuracy = (probabilities.argmax(dim=1) == labels).double().mean().item()
        nll = -probabilities.double().gather(1, labels.unsqueeze(1)).log().mean().item()
        assert done.change.accuracy[at] == pytest.approx(accuracy)
        assert done.change.nll[at] == pytest.approx(nll, rel=1e-4)
    measured = metadata(path)["measured"]
    assert measured["n"] == len(labels) and measured["split"] == "validation"
    assert tuple(measured["accuracy"]) == done.change.accuracy
    assert_promises_are_of_its_own_logits(found, labels, metadata(path), classifier, asked)
    if format == "onnx":
        proto = onnx.load(path)
        kinds = [
            onnx.TensorProto.DataType.Name(t.data_type) for t in proto.graph.initializer if len(t.dims) == 4
        ]
        assert set(kinds) == {"FLOAT16" if precision == "fp16" else "INT8"}
        assert_surroundings_are_in_float32(proto.graph)
        if precision == "int8":  # each channel of a weight has a scale of its own
            scales = {
                t.name: t.dims for t in proto.graph.initializer if t.name.endswith("conv1.weight_scale")
            }
            assert scales and all(len(dims) == 1 and dims[0] > 1 for dims in scales.values())


def assert_promises_are_of_its_own_logits(found, labels, written, classifier, asked) -> None:
    logits = found["logits"].double() * written["temperature"]
    own = Calibration.fit(logits, labels, average="logits")
    assert written["temperature"] == pytest.approx(own.temperature, rel=1e-3)
    assert written["temperature"] != classifier.temperature
    own_classifier = nf.Classifier(classifier.network, classifier.spec, own)
    limits = asked.limits(own_classifier)
    promises = written["promises"]
    assert promises["quantiles"] == pytest.approx(limits.quantiles, rel=1e-4)
    assert promises["quantiles"] != asked.limits(classifier).quantiles
    assert promises["alarm_above"] == pytest.approx(limits.detector.alarm_above, rel=1e-3)
    assert promises["calibration_images"] == len(labels)
    assert promises["threshold_temperature"] == 1
    assert written["calibration"] == classifier.calibration.digest
    assert set(found) == {*OUTPUTS, *PROMISED}
    covered = found["set"].gather(1, labels.unsqueeze(1)).double().mean().item()
    assert covered >= LIMITS["coverage"]  # by the quantile's definition, of the images it is from
    assert found["out_of_distribution"].double().mean() <= LIMITS["accept_false_alarms"]


def assert_surroundings_are_in_float32(graph) -> None:
    """Normalisation, and all that is made of the logits."""
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    subtract, multiply = [node for node in graph.node if node.op_type in ("Sub", "Mul")][:2]
    assert (made_by[subtract.input[0]], made_by[multiply.input[0]]) == ("Cast", "Sub")
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert {kinds[subtract.input[1]], kinds[multiply.input[1]]} == {onnx.TensorProto.FLOAT}
    for output in graph.output:
        assert made_by[output.name] != "DequantizeLinear", output.name
        if output.name in OUTPUTS and output.name not in ("classes", "votes"):
            assert output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_eight_bits_without_images_to_calibrate_on(digits, tmp_path: Path) -> None:
    shown = replace(digits, train=colourful(0), validation=colourful(9))
    with pytest.raises(
        ValueError,
        match=r"^data must be a data set with training images, got 'digits'; int8 is calibrated on training",
    ):
        export_reduced(tiny(Tiny()), tmp_path / "model.onnx", shown, precision="int8")


@pytest.mark.parametrize("images", [pixels(0), pixels(3, 3, 16, 8), pixels(3).float()])
def test_images_that_are_no_pixels_of_the_network(images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"^images must be torch\.uint8 of shape \(n, 3, 16, 16\) with n of at least 1, "
        r"got torch\.\w+ of shape \(",
    ):
        export(tiny(Tiny()), tmp_path / "model.onnx", images)


class Loud(Tiny):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images * 1e5) / 1e5


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_fewer_bits_that_overflow_are_refused(format: str, digits, tmp_path: Path) -> None:
    shown = replace(digits, train=colourful(70), validation=colourful(70))
    with pytest.raises(RuntimeError, match="is discarded: its probabilities are not finite"):
        export_reduced(tiny(Loud()), tmp_path / "model", shown, precision="fp16", format=format)
    assert not list(tmp_path.iterdir())


def colourful(n: int) -> TensorSplit:
    return TensorSplit(pixels(n), torch.arange(n) % 3)


def test_without_a_validation_split_the_test_split_is_measured_on(digits, tmp_path: Path) -> None:
    shown = replace(digits, train=colourful(9), validation=None, test=colourful(70))
    done = export_reduced(tiny(Tiny()), tmp_path / "model.onnx", shown, precision="fp16")
    assert done.change.n == 70
    assert metadata(tmp_path / "model.onnx")["measured"]["split"] == "test"


def test_sets_bounds_and_marks_travel_with_the_file(finished_run, digits, tmp_path) -> None:
    classifier = nf.Classifier.from_pretrained(finished_run)
    limits = classifier.limits(**LIMITS, detector="mutual-information")
    path = tmp_path / "model.pt2"  # for ONNX, see tests/serve/test_same_everywhere.py
    export(classifier, path, digits.validation.images, format="pt2", limits=limits)
    images = digits.test.images
    found, expected = run_file(path, images), classifier.predict_within(images, limits)
    assert list(found) == [*OUTPUTS, "abstain", "set", "p_value", "out_of_distribution"]
    for name, wanted in (
        ("set", expected.sets),
        ("abstain", expected.abstains),
        ("out_of_distribution", expected.out_of_distribution),
        ("classes", expected.classes),
    ):
        assert torch.equal(found[name], wanted), name
    assert found["p_value"].dtype == torch.float32
    assert (found["p_value"] - expected.p_values).abs().max() < 1.5 / 146  # a rank, by rounding
    assert len({*found["set"].sum(dim=1).tolist()}) > 1 and 0 < found["abstain"].sum() < len(images)
    about = metadata(path)
    assert {name: about["promises"][name] for name in LIMITS} == LIMITS
    assert about["promises"]["quantiles"] == limits.quantiles
    assert about["promises"]["threshold"] == limits.threshold
    assert about["promises"]["calibration_images"] == 145
    assert list(about["outputs"]) == list(found)
