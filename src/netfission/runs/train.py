"""One run, from its settings to a folder with a trained and evaluated network."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from netfission.config import RunConfig
from netfission.data.splits import CorruptImageError
from netfission.models import WeightsReport
from netfission.runs.callbacks import MethodHooks, SameCheckpoint
from netfission.runs.evaluate import evaluate
from netfission.runs.folder import RunFolder, environment
from netfission.runs.found_budget import FoundBudget
from netfission.runs.lightning_module import RunDataModule, TrainingModule
from netfission.runs.overlap import warn_of_held_out_images
from netfission.runs.setup import (
    build_network,
    build_parent,
    check_batch_size,
    check_run,
    check_unchanged,
    check_weights_task,
    data_task,
    few_steps,
    load_run_data,
    network_spec,
    rate_scales,
    with_processes,
)
from netfission.runs.trainer import make_trainer, without_irrelevant_messages
from netfission.tasks.base import EvaluationResult
from netfission.utils.files import write_json
from netfission.utils.interrupts import ended_if_stuck


def train(
    config: RunConfig,
    path: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
) -> EvaluationResult | None:
    """Train, save and evaluate one network; all files are in the folder `path`, see `RunFolder`.

    Args:
        config: all settings. In a process that torchrun or SLURM has started, one of several, the numbers of
            devices and machines are those of the processes, see `netfission.runs.setup.with_processes`.
        path: folder of the run; new or empty, or with `resume` that of a run with the same settings.
        resume: continue after the last whole epoch in the folder.
        progress: say what was found in the data set, and show a progress bar on a terminal, else one line per
            epoch.
        callbacks: Lightning callbacks of your own, which run after the others.

    Returns:
        Metrics of the trained network on the test split, an `Evaluation` or that of another task;
        None in the helper processes of a training on
        several devices.

    Raises:
        ValueError: a setting is not valid.
        OSError: a file cannot be read or written.
        DivergedError: the loss is no longer finite, or the trained network's NLL is absurdly large; the
            checkpoint of the last whole epoch stays.
        KeyboardInterrupt: the training was stopped; the checkpoint stays, too.

    Warns:
        UserWarning: see `netfission.runs.overlap.warn_of_held_out_images`.

    Example:
        >>> import tempfile
        >>> from netfission.config import DataConfig, FissionConfig, ModelConfig, TrainingConfig
        >>> config = RunConfig(
        ...     DataConfig("digits", limit_per_class=5), ModelConfig("wrn-10-1"), FissionConfig(exits=2),
        ...     TrainingConfig(epochs=1, accelerator="cpu"),
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     evaluation = train(config, Path(folder, "run"), progress=False)
        >>> evaluation.n
        359
    """
    config = with_processes(config)
    folder = RunFolder(path)
    is_main = getattr(rank_zero_only, "rank", 0) == 0
    if is_main:
        folder.claim(config, resume)
    if resume and folder.weights.is_file():
        return evaluate(folder, config) if is_main else None
    with without_irrelevant_messages(), folder.locked() if is_main else nullcontext():
        # Only now, as another process that trains here moves its checkpoints.
        checkpoint = folder.resumable() if resume else None
        if checkpoint is not None and is_main:
            folder.warn_of_other_threads()
        seed, exits = config.fission.seed, config.fission.exits
        try:
            method = check_run(config)
            data = load_run_data(config.data, seed, training=True)
            check_unchanged(data, folder.load_data_summary() if resume else None)
            weights = folder.read_weights(config)
            check_weights_task(config, weights)
            reports: list[WeightsReport] = []
            network = build_network(config, data, weights, reports.append, budget=folder.load_budget())
            check_batch_size(config.training.batch_size, network, data)
            parent = build_parent(config, data, weights)
            scales = rate_scales(config, data, network)
            hooks = MethodHooks(method.hooks(exits, config.training))
            epochs = method.epochs(config.training.epochs, exits)
            task = data_task(config, data)
            trainer = make_trainer(
                task.training(config.training),
                epochs,
                folder,
                progress=progress,
                callbacks=[SameCheckpoint(checkpoint), hooks, *callbacks],
            )
        except BaseException:
            if is_main and not resume:
                folder.release()
            raise
        module = TrainingModule(network, config.training, seed, exits, method, scales, parent, task)
        if config.training.compile:
            network.compile()
        if is_main:
            write_json(folder.data_summary, data.summary.to_json())
            folder.save_weights_report(reports)
            if found := FoundBudget.of(network, environment()):
                write_json(folder.budget, found.to_json())
            if progress:
                remarks = few_steps(len(data.train), config.training.batch_size, epochs)
                remarks += [found.text()] if found else []
                print("\n".join([data.summary.text(), *map(str, reports[:1]), *remarks]), flush=True)
            if not resume:
                warn_of_held_out_images(config)
        try:
            with _never_stuck(trainer):
                trainer.fit(module, datamodule=RunDataModule(config, data), ckpt_path=checkpoint)
        except SystemExit as error:  # Lightning's answer to Ctrl-C
            raise KeyboardInterrupt from error
        except ValueError as error:  # a method refuses the training's length, which is known only now
            spoiled = isinstance(error, CorruptImageError)  # the run goes on once the image is back
            if is_main and not (resume or spoiled or folder.checkpoint.is_file()):
                folder.release()
            raise
        if not trainer.is_global_zero:
            return None
        module.stop_if_useless(data)
        folder.save_network(network, network_spec(config, data, network))
        folder.previous_checkpoint.unlink(missing_ok=True)  # nothing is resumed any more
    return evaluate(folder, config, data)


@contextmanager
def _never_stuck(trainer: Trainer) -> Iterator[None]:
    """End this process if it is interrupted while processes wait for each other; it ends those it started."""
    if trainer.world_size == 1:
        yield
        return
    launcher = trainer.strategy.launcher

    def end_others() -> None:
        for process in getattr(launcher, "procs", ()):
            process.kill()

    with ended_if_stuck(end_others, "stopped; the same command with --resume goes on"):
        yield
