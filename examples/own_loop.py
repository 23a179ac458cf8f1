"""Divide a timm model and train it in a loop of your own, on scikit-learn's digits: a minute or two on a CPU.

python examples/own_loop.py
"""

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

import netfission as nf

SIDE = 32  # pixels; the digits have 8
MEAN, STD = 0.3, 0.37  # of their pixels


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return pixels `(n, 1, 32, 32)` uint8 and labels: 500 training images, and the other images."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) * (255 / 16)
    pixels = F.interpolate(images, size=SIDE, mode="bilinear").round().to(torch.uint8)
    labels = torch.tensor(data.target, dtype=torch.int64)
    return pixels[:500], labels[:500], pixels[500:], labels[500:]


def normalised(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 - MEAN) / STD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("digits-classifier"))
    chosen = parser.parse_args()
    torch.manual_seed(0)
    pixels, labels, test_pixels, test_labels = digits()
    images = normalised(pixels)

    # Any classifier that returns (batch, classes); it is not changed.
    model = timm.create_model("resnet10t", num_classes=10, in_chans=1)
    net = nf.fission(model, exits=3, grouping="channels", example_input=images[:2])
    print(net.summary())

    criterion = nf.EnsembleDistillationLoss(temperature=3.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = chosen.epochs * (len(images) // 50)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=steps)
    for _ in tqdm(range(chosen.epochs), unit="epoch"):
        for rows in torch.randperm(len(images)).split(50):
            loss = criterion(net(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    net.eval()
    with torch.no_grad():
        logits = net(normalised(test_pixels))  # (images, exits, classes)
    for number, exit_logits in enumerate(logits.unbind(dim=1)):
        print(f"exit {number}: {100 * (exit_logits.argmax(1) == test_labels).double().mean().item():.2f} %")
    ensemble = nf.ensemble_probabilities(logits).argmax(1)
    print(f"ensemble: {100 * (ensemble == test_labels).double().mean().item():.2f} %")

    classifier = nf.Classifier.from_network(
        net, model="resnet10t", classes=list("0123456789"), shape=(1, SIDE, SIDE), mean=[MEAN], std=[STD]
    )
    classifier.save_pretrained(chosen.out)
    loaded = nf.Classifier.from_pretrained(chosen.out)  # usually in another process
    predictions = loaded.predict(test_pixels[:5])
    for name, confidence, disagreement in zip(
        predictions.classes.tolist(), predictions.confidence, predictions.disagreement, strict=True
    ):
        print(f"{name}: confidence {100 * confidence:.1f} %, disagreement {100 * disagreement:.0f} %")
    print(f"wrote {chosen.out}")


if __name__ == "__main__":
    main()
