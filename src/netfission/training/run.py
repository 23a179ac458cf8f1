"""One run, from its settings to a folder with a trained and evaluated network."""

import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from netfission.config import DataConfig, RunConfig
from netfission.data import Augmentation, Batches, ImageData, Split, load_data
from netfission.evaluation import Evaluation, collect_logits, evaluate_logits
from netfission.evaluation.calibration import Calibration
from netfission.evaluation.cascade import CascadeEvaluation
from netfission.evaluation.cascade import evaluate_cascade as measure_cascade
from netfission.evaluation.trust import Trust
from netfission.inference.cascade import Rule
from netfission.methods.base import Plan, seeded
from netfission.methods.registry import find_method
from netfission.models import create_model
from netfission.network import FissionNetwork
from netfission.training.callbacks import AccuracyBar, EpochLines, EpochTable, WholeCheckpoints
from netfission.training.folder import ModelCard, RunFolder, environment
from netfission.training.module import FissionTraining
from netfission.utils.files import write_whole

EVALUATION_BATCH = 256


def train(
    config: RunConfig,
    path: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
) -> Evaluation | None:
    """Train, save and evaluate one network; everything it leaves is in the folder `path`.

    Args:
        config: all settings.
        path: the run's folder; new or empty, or with `resume` one that a run with the same settings began.
        resume: go on after the last whole epoch that the folder holds.
        progress: show a progress bar, or a line an epoch where standard output is no terminal.
        callbacks: Lightning callbacks of your own, run after ours.

    Returns:
        The figures of the trained network on the test split; None in the helper processes of a training
        on several devices.

    Raises:
        ValueError: a setting is not what it takes.
        OSError: a file cannot be read or written.
        DivergedError: the loss stopped being finite; the checkpoint of the last whole epoch is kept.
        KeyboardInterrupt: it was stopped; likewise.
    """
    folder = RunFolder(path)
    main_process = getattr(rank_zero_only, "rank", 0) == 0
    if main_process:
        folder.claim(config, resume)
    if resume and folder.weights.is_file():
        return evaluate(folder, config) if main_process else None
    checkpoint = folder.resumable() if resume else None
    with _quietly(), folder.locked() if main_process else nullcontext():
        try:
            method = find_method(config.method, config.fission)
            data = load(config.data, config.fission.seed)
            network = build_network(config, data)
            own = method.callbacks(config.fission.exits, config.training)
            epochs = method.epochs(config.training.epochs, config.fission.exits)
            trainer = _trainer(config, epochs, folder, progress, [*own, *callbacks])
        except BaseException:
            if main_process and not resume:
                folder.release()
            raise
        seed, exits = config.fission.seed, config.fission.exits
        module = FissionTraining(network, config.training, seed, exits, method)
        if config.training.compile:
            network.compile()
        try:
            trainer.fit(module, datamodule=Feed(config, data), ckpt_path=checkpoint, weights_only=False)
        except SystemExit as error:  # Lightning's answer to Ctrl-C
            raise KeyboardInterrupt from error
        except ValueError:  # a method refuses the training's length, which is known only now
            if main_process and not resume and not folder.checkpoint.is_file():
                folder.release()
            raise
        if not trainer.is_global_zero:
            return None
        folder.save_network(network, describe(config, data))
    return evaluate(folder, config, data)


def evaluate(folder: RunFolder, config: RunConfig, data: ImageData | None = None) -> Evaluation:
    """Run the network that lies in a run's folder over the test split, and keep the figures there.

    Where there is a validation split, the network's probabilities are calibrated on it, and that kept too;
    `trust.json` says what the calibration is worth on the test split, see `Trust`.

    Args:
        folder: of a finished run.
        config: its settings.
        data: its data set, if loaded already.

    Raises:
        ValueError: the folder holds no finished run, or the data set's classes are not the network's.
    """
    network, _, data, device = ready(folder, config, data)
    batches = make_batches(data.test, data, EVALUATION_BATCH, device=device, workers=config.data.workers)
    logits, labels = collect_logits(network, batches, device)
    evaluation = evaluate_logits(logits, labels)
    write_whole(folder.evaluation, evaluation.to_json())
    calibration = None
    if data.validation is not None:
        shown = make_batches(
            data.validation, data, EVALUATION_BATCH, device=device, workers=config.data.workers
        )
        calibration = Calibration.fit(*collect_logits(network, shown, device))
        write_whole(folder.calibration, calibration.to_json())
    trust = Trust.of(logits, labels, data.classes, calibration)
    write_whole(folder.path / "trust.json", trust.to_json())
    return evaluation


def evaluate_cascade(
    folder: RunFolder,
    config: RunConfig,
    *,
    rule: Rule = "margin",
    lose: float | None = None,
    spend: float | None = None,
    single: RunFolder | None = None,
) -> CascadeEvaluation:
    """Choose a cascade's thresholds on a run's validation split and measure it on its test split.

    The figures and a picture of them are kept in the run's folder.

    Args:
        folder: of a finished run.
        config: its settings.
        rule: when an image is sure enough to stop, see `netfission.inference.sureness`.
        lose: points of accuracy that may be lost, see `netfission.inference.choose_thresholds`.
        spend: instead, mean MACs that may be spent, over the single network's.
        single: a finished run of the same model with one exit, whose accuracy is to stand beside.

    Raises:
        ValueError: the run has no validation split, `single` is another model's, the target is out of
            reach, or see `evaluate`.
    """
    if config.data.validation == 0:
        raise ValueError(
            "validation=0: thresholds are chosen on validation images; takes a run trained with a share of "
            "them above 0"
        )
    network, card, data, device = ready(folder, config)
    if not isinstance(network, FissionNetwork):
        raise ValueError(
            f"run={folder.path}: a cascade takes a run with method=fission, not {config.method.method}"
        )
    if network.exits == 1:
        raise ValueError("exits=1: a cascade takes a run of two exits or more")
    accuracy = None if single is None else _single_accuracy(single, config, card, data, device)
    with torch.random.fork_rng([]):
        model = card.single()
    batches = partial(
        make_batches, data=data, batch_size=EVALUATION_BATCH, device=device, workers=config.data.workers
    )
    assert data.validation is not None
    validation = collect_logits(network, batches(data.validation), device)
    test = collect_logits(network, batches(data.test), device)
    mixed = zip(batches(data.test, shuffle=True), range(2), strict=False)
    images = torch.cat([images for (images, _), _ in mixed])
    evaluation = measure_cascade(
        network,
        model.eval().to(device),
        validation,
        test,
        images,
        rule=rule,
        lose=lose,
        spend=spend,
        single_accuracy=accuracy,
    )
    record = asdict(evaluation) | {"environment": environment()}
    write_whole(folder.path / "cascade.json", json.dumps(record, indent=2) + "\n")
    evaluation.draw(folder.path / "cascade")
    return evaluation


def ready(
    folder: RunFolder, config: RunConfig, data: ImageData | None = None
) -> tuple[nn.Module, ModelCard, ImageData, str]:
    """A finished run's network with its card, its data set, and the device that the network was put on."""
    network, card = folder.load_network()
    data = data or load(config.data, config.fission.seed)
    if data.classes != card.classes:
        raise ValueError(
            f"data={config.data.data!r}: its {len(data.classes)} classes are not the {len(card.classes)} "
            f"that {folder.card} names"
        )
    device = "cuda" if torch.cuda.is_available() and config.training.accelerator != "cpu" else "cpu"
    return network.to(device), card, data, device


def _single_accuracy(
    single: RunFolder, config: RunConfig, card: ModelCard, data: ImageData, device: str
) -> float:
    """Accuracy on the test split of the network with one exit that lies in another run's folder."""
    network, own = single.load_fission()
    if network.exits > 1 or (own.model, own.classes, own.shape) != (card.model, card.classes, card.shape):
        raise ValueError(
            f"single={single.path}: is {own.model} with {network.exits} exits on {len(own.classes)} classes; "
            f"takes a run of {card.model} with exits=1 on the same data"
        )
    data = replace(data, mean=tuple(own.mean), std=tuple(own.std))  # as it was trained
    batches = make_batches(data.test, data, EVALUATION_BATCH, device=device, workers=config.data.workers)
    return evaluate_logits(*collect_logits(network.to(device), batches, device)).ensemble["top1"]


def load(config: DataConfig, seed: int) -> ImageData:
    """The data set that the settings name."""
    return load_data(
        config.data,
        image_size=config.image_size,
        validation=config.validation,
        seed=seed,
        corrupt=config.corrupt,
        limit_per_class=config.limit_per_class,
    )


def build_network(config: RunConfig, data: ImageData) -> nn.Module:
    """The network that the settings name, on the CPU, with its weights drawn from the seed."""

    def create() -> nn.Module:
        model = create_model(
            config.model.model,
            len(data.classes),
            in_channels=data.shape[0],
            pretrained=config.model.pretrained,
        )
        return model.to(memory_format=torch.channels_last) if config.training.channels_last else model

    batches: list[tuple[Tensor, Tensor]] = []
    if config.fission.sparsity > 0 or config.fission.dealing == "importance":
        shown = make_batches(
            data.train, data, config.training.batch_size, shuffle=True, seed=config.fission.seed
        )
        batches = [batch for batch, _ in zip(shown, range(config.training.pruning_batches), strict=False)]
    plan = Plan(partial(seeded, create), config.fission, torch.zeros(2, *data.shape), batches)
    return find_method(config.method).build(plan)


def describe(config: RunConfig, data: ImageData) -> ModelCard:
    """What is needed to use the trained network."""
    return ModelCard(
        model=config.model.model,
        classes=list(data.classes),
        shape=list(data.shape),
        mean=list(data.mean),
        std=list(data.std),
        fission=asdict(config.fission),
        netfission=version("netfission"),
        method=asdict(config.method),
    )


def make_batches(
    split: Split,
    data: ImageData,
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    shuffle: bool = False,
    augment: Augmentation | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Batches:
    """Normalised batches of a split, on a device."""
    return Batches(
        split,
        batch_size,
        mean=data.mean,
        std=data.std,
        device=device,
        shuffle=shuffle,
        drop_last=shuffle and len(split) >= batch_size * world_size,
        augment=augment,
        seed=seed,
        rank=rank,
        world_size=world_size,
        workers=workers,
        classes=len(data.classes),
    )


class Feed(lightning.LightningDataModule):
    """Gives each process of a training its batches, on its device."""

    def __init__(self, config: RunConfig, data: ImageData) -> None:
        super().__init__()
        self.config = config
        self.data = data

    def train_dataloader(self) -> Batches:
        """Shuffled, augmented, this process's share."""
        return self._batches(self.data.train, shuffle=True, augment=augmentation(self.config.data, self.data))

    def val_dataloader(self) -> Batches | list[Batches]:
        """As they are; none where nothing is held out."""
        return [] if self.data.validation is None else self._batches(self.data.validation)

    def _batches(
        self, split: Split, *, shuffle: bool = False, augment: Augmentation | None = None
    ) -> Batches:
        assert self.trainer is not None
        return make_batches(
            split,
            self.data,
            self.config.training.batch_size,
            device=self.trainer.strategy.root_device,
            shuffle=shuffle,
            augment=augment,
            seed=self.config.fission.seed,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            workers=self.config.data.workers,
        )


def augmentation(config: DataConfig, data: ImageData) -> Augmentation:
    """The settings' augmentation; what they leave open suits photographs, and digits are left as they are."""
    photographs = data.name != "digits"
    padding = data.shape[1] // 8 if photographs else 0
    return Augmentation(
        crop_padding=padding if config.crop_padding is None else config.crop_padding,
        flip=photographs if config.flip is None else config.flip,
        mix=config.mix,
        mix_alpha=config.mix_alpha,
    )


def _trainer(
    config: RunConfig, epochs: int, folder: RunFolder, progress: bool, more: Sequence[Callback]
) -> lightning.Trainer:
    training = config.training
    callbacks: list[Callback] = [
        EpochTable(folder.metrics),
        ModelCheckpoint(
            folder.checkpoint.parent,
            filename=folder.checkpoint.stem,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        ),
    ]
    if progress:
        callbacks.append(AccuracyBar() if sys.stdout.isatty() else EpochLines())
    if training.ema is not None:
        callbacks.append(EMAWeightAveraging(decay=training.ema))
    try:
        return lightning.Trainer(
            accelerator=training.accelerator,
            devices=training.devices,
            num_nodes=training.machines,
            precision=training.precision,
            max_epochs=epochs,
            accumulate_grad_batches=training.accumulate,
            gradient_clip_val=training.clip,
            callbacks=[*callbacks, *more],
            plugins=[WholeCheckpoints()],
            logger=TensorBoardLogger(folder.path, name=None, version="tensorboard"),
            log_every_n_steps=50,
            num_sanity_val_steps=0,
            enable_progress_bar=progress and sys.stdout.isatty(),
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except MisconfigurationException as error:
        asked = f"accelerator={training.accelerator!r}, devices={training.devices}"
        raise ValueError(f"{asked}: {error}") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Without Lightning's remarks on things that are as they are meant to be here."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for remark in (
                ".*does not have many workers.*",
                ".*Checkpoint directory .* exists and is not empty.*",
                ".*No `val_dataloader`.*",
                ".*validation_step.*val_dataloader.*",
                ".*LeafSpec.*deprecated.*",
                ".*smaller than the logging interval.*",
                ".*tensorboard.*",
                ".*dirpath has changed.*",
                ".*sync_dist.*",  # the figures are summed over the devices before they are logged
                ".*Total length of .* across ranks is zero.*",
            ):
                warnings.filterwarnings("ignore", remark)
            yield
    finally:
        logger.setLevel(level)
