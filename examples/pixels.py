"""Divide a network that classifies pixels, and train it in a loop of your own: segmentation with uncertainty.

    python examples/pixels.py photographs --void 11 --model torchvision/lraspp_mobilenet_v3_large

`photographs` contains `train/images`, `train/masks`, `test/images` and `test/masks`; the pixels of a mask are
class numbers. If no folder is given, the script writes squares of four of scikit-learn's digits, in which
each pixel is of a digit or of the background, and trains a small U-Net on them: a minute on a CPU.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import netfission as nf
from netfission.data.mask_folders import MaskData, MaskSplit, load_masks
from netfission.data.mask_transforms import MaskTransform
from netfission.ensemble import ensemble_log_probabilities, mutual_information, predictive_entropy
from netfission.evaluation.pixels import PixelScores
from netfission.models import create_model


def block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """An encoder and a decoder, whose features are concatenated (Ronneberger et al. 2015)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.down, self.bottom = block(3, 24), block(24, 48), block(48, 96)
        self.up, self.last = block(96 + 48, 48), block(48 + 24, 24)
        self.classifier = nn.Conv2d(24, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        first = self.first(images)
        down = self.down(F.max_pool2d(first, 2))
        bottom = self.bottom(F.max_pool2d(down, 2))
        up = self.up(torch.cat([F.interpolate(bottom, size=down.shape[-2:]), down], dim=1))
        return self.classifier(self.last(torch.cat([F.interpolate(up, size=first.shape[-2:]), first], dim=1)))


def write_digits(folder: Path) -> Path:
    """Write 120 squares of four digits for training, and 40 for the test; the background is class 10."""
    data = load_digits()
    digits = np.repeat(np.repeat(data.images, 2, 1), 2, 2)  # 16 × 16 pixels, from 0 to 16
    for number in range(160):
        images, labels = digits[4 * number :][:4], data.target[4 * number :][:4]
        masks = np.where(images > 4, labels[:, None, None], 10)
        kinds = {"images": images * (255 / 16), "masks": masks}
        for kind, parts in kinds.items():
            square = np.block([[parts[0], parts[1]], [parts[2], parts[3]]]).astype("uint8")
            file = folder / ("train" if number < 120 else "test") / kind / f"{number:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(square).save(file)
    return folder


def normalised(pixels: Tensor, data: MaskData) -> Tensor:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    return (pixels / 255 - mean) / std


def batch(split: MaskSplit, rows: list[int], transform: MaskTransform | None = None) -> tuple[Tensor, Tensor]:
    pairs = [split[row] for row in rows]
    if transform is not None:
        seeds = torch.randint(2**31, (len(pairs),)).tolist()
        pairs = [transform(*pair, seed) for pair, seed in zip(pairs, seeds, strict=True)]
    images, masks = zip(*pairs, strict=True)
    return torch.stack(images), torch.stack(masks)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="photographs and masks (default: digits)")
    parser.add_argument("--model", help="name of a model of torchvision (default: a small U-Net)")
    parser.add_argument("--void", type=int, help="number of pixels without a class (default: see load_masks)")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("pixels"))
    chosen = parser.parse_args()
    torch.manual_seed(0)
    chosen.out.mkdir(parents=True, exist_ok=True)
    data = load_masks(chosen.folder or write_digits(chosen.out / "digits"), void=chosen.void)
    assert data.shape is not None, "photographs of one size"
    classes = len(data.classes)
    model = create_model(chosen.model, classes) if chosen.model else UNet(classes)

    images, masks = batch(data.train, [0, -1])
    net = nf.fission(model, exits=3, grouping="channels", example_input=normalised(images, data))
    print(net.summary())

    flip = chosen.folder is not None  # digits have a left and a right
    transform = MaskTransform(data.shape[1:], scale=(0.8, 1.25), flip=flip, void=data.void)
    criterion = nf.EnsembleDistillationLoss(ignore_index=data.void)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    batch_size = min(8, len(data.train))
    batches = len(data.train) // batch_size
    steps = chosen.epochs * batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in tqdm(range(chosen.epochs), unit="epoch"):
        for rows in torch.randperm(len(data.train)).split(batch_size)[:batches]:
            images, masks = batch(data.train, rows.tolist(), transform)
            logits = net(normalised(images, data))  # (batch, exits, classes, height, width)
            loss = criterion(logits, masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    net.eval()
    scores = PixelScores(classes, data.void)
    with torch.no_grad():
        for rows in torch.arange(len(data.test)).split(8):
            images, masks = batch(data.test, rows.tolist())
            logits = net(normalised(images, data))
            scores.add(ensemble_log_probabilities(logits), masks)
    print(", ".join(f"{name} {value:.4f}" for name, value in scores.result().items()))

    answers = ensemble_log_probabilities(logits).argmax(dim=1)  # of the last batch
    maps = {
        "classes": answers[-1] / (classes - 1),
        "entropy": predictive_entropy(logits)[-1] / np.log(classes),
        "mutual-information": mutual_information(logits)[-1] / np.log(3),
    }
    for name, values in maps.items():
        Image.fromarray((255 * values).round().byte().numpy()).save(chosen.out / f"{name}.png")
    print(f"wrote {', '.join(f'{name}.png' for name in maps)} to {chosen.out}")


if __name__ == "__main__":
    main()
