"""Fine-tune a timm model on a folder of images, and classify images with their uncertainty.

    python examples/image_folder.py photographs --model resnet18 --pretrained --image-size 224

`photographs` contains `train/CLASS/*.jpg` and optionally `test/CLASS/*.jpg`. If no folder is given, the
script writes scikit-learn's digits to a folder and trains on them, which takes a minute or two on a CPU.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits

import netfission as nf
from netfission.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from netfission.runs.train import train


def write_digits(folder: Path) -> Path:
    """Write 50 digits of each class as `train/CLASS/*.png`, and 30 as `test/CLASS/*.png`."""
    data = load_digits()
    counts = dict.fromkeys(range(10), 0)
    for pixels, label in zip(data.images, data.target, strict=True):
        number = counts[int(label)]
        counts[int(label)] += 1
        split = "train" if number < 50 else "test"
        if number < 80:
            file = folder / split / str(label) / f"{number:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * (255 / 16)).astype("uint8")).save(file)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="folder of images (default: digits)")
    parser.add_argument("--model", default="resnet10t", help="name of a timm model")
    parser.add_argument("--pretrained", action="store_true", help="start from timm's published weights")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/image-folder"))
    arguments = parser.parse_args()
    folder = arguments.folder or write_digits(arguments.out.with_name(arguments.out.name + "-images"))

    config = RunConfig(
        DataConfig(
            str(folder), image_size=arguments.image_size, validation=0.2, flip=arguments.folder is not None
        ),
        ModelConfig(arguments.model, pretrained=arguments.pretrained),
        nf.FissionConfig(exits=3, grouping="channels"),
        TrainingConfig(epochs=arguments.epochs, batch_size=32, learning_rate=0.02, schedule="one_cycle"),
    )
    evaluation = train(config, arguments.out)  # the same as `netfission train`
    assert evaluation is not None
    print(evaluation.table())

    classifier = nf.Classifier.from_pretrained(arguments.out)
    files = sorted((folder / "test").rglob("*.*"))[::40] if (folder / "test").is_dir() else []
    for file in files:
        with Image.open(file) as image:
            prediction = classifier.predict(classifier.pixels(image).unsqueeze(0), risk=0.05)
        names = [classifier.spec.classes[vote] for vote in prediction.votes[0]]
        answer = classifier.spec.classes[int(prediction.classes[0])]
        confidence = 100 * prediction.confidence[0].item()
        votes = ", ".join(names)
        note = "; too uncertain, ask a person" if torch.any(prediction.abstains) else ""
        name = f"{file.parent.name}/{file.name}"
        print(f"{name}: {answer}, confidence {confidence:.0f} %; exits vote {votes}{note}")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
