"""A run's folder: what lies in it, how it is claimed, saved to and read back."""

import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
import yaml
from filelock import FileLock, Timeout

from netfission.classifier.folder import ModelFolder, NetworkSpec
from netfission.config import RunConfig
from netfission.network import FissionNetwork
from netfission.utils.files import write_whole


@dataclass(frozen=True)
class RunFolder(ModelFolder):
    """The files of a run: of its network, and of its training.

    Attributes:
        path: the folder.
    """

    @property
    def metrics(self) -> Path:
        """One row an epoch."""
        return self.path / "metrics.csv"

    @property
    def checkpoint(self) -> Path:
        """The state after the last whole epoch, to resume from."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def lock(self) -> Path:
        """Held while a process trains here."""
        return self.path / ".lock"

    def claim(self, config: RunConfig, resume: bool) -> None:
        """Make the folder and write its settings, or with `resume` take up the run that it holds.

        Raises:
            ValueError: it holds a run and `resume` is False, holds none and `resume` is True, or was
                begun with other settings.
            OSError: it cannot be written.
        """
        if resume:
            self._match(config)
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(
                f"out={self.path}: is already used; takes a new folder, or pass resume to go on with its run"
            )
        else:
            made = yaml.safe_dump(environment()).splitlines()
            comments = "".join(f"# {line}\n" for line in ["Made with:", *made])
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                write_whole(self.config, config.to_yaml() + comments)
            except OSError as error:
                raise OSError(f"out={self.path}: cannot be written ({error.strerror})") from error

    def release(self) -> None:
        """Undo `claim` where nothing has run yet that is worth keeping."""
        shutil.rmtree(self.path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in the folder; ValueError if one does."""
        lock = FileLock(self.lock)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(f"out={self.path}: another process is training in it; wait for it") from error
        try:
            yield
        finally:
            lock.release()

    def resumable(self) -> Path | None:
        """The checkpoint to go on from; None where no epoch had ended.

        Raises:
            ValueError: it is damaged.
        """
        if not self.checkpoint.is_file():
            return None
        if not is_zipfile(self.checkpoint):
            raise ValueError(f"{self.checkpoint}: is damaged; remove it to begin the run again with resume")
        return self.checkpoint

    def load_fission(self) -> tuple[FissionNetwork, NetworkSpec]:
        """`load_network` of a run whose method is fission; ValueError if it is another."""
        network, spec = self.load_network()
        if not isinstance(network, FissionNetwork):
            raise ValueError(f"{self.path}: takes a run with method=fission, not {spec.method['method']}")
        return network, spec

    def _match(self, config: RunConfig) -> None:
        begun, now = self.load_config().to_dict(), config.to_dict()
        for name, value in now.items():
            if value != begun[name]:
                raise ValueError(
                    f"{name}={value!r}: {self.path} was begun with {begun[name]!r}; resume takes the "
                    "settings it was begun with"
                )


def environment() -> dict[str, Any]:
    """What a result may depend on beside its settings: versions and devices."""
    packages = ("netfission", "torch", "torchvision", "timm", "lightning", "numpy")
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
    }
