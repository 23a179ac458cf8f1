"""Fine-tune a timm model on a folder of images, look at its doubts and ask it about images.

    python examples/image_folder.py photographs --model resnet18 --pretrained --image_size 224

`photographs` holds `train/CLASS/*.jpg` and, if it has one, `test/CLASS/*.jpg`. Without a folder,
scikit-learn's digits are written out as one, to try it in a minute or two on a CPU.
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
    """Fifty digits of each class as `train/CLASS/*.png`, thirty as `test/CLASS/*.png`."""
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
    parser.add_argument("folder", type=Path, nargs="?", help="of images; default digits, written out")
    parser.add_argument("--model", default="resnet10t", help="any name that timm knows")
    parser.add_argument("--pretrained", action="store_true", help="start from timm's published weights")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/image-folder"))
    chosen = parser.parse_args()
    folder = chosen.folder or write_digits(chosen.out.with_name(chosen.out.name + "-images"))

    config = RunConfig(
        DataConfig(str(folder), image_size=chosen.image_size, validation=0.2, flip=chosen.folder is not None),
        ModelConfig(chosen.model, pretrained=chosen.pretrained),
        nf.FissionConfig(exits=3, grouping="channels"),
        TrainingConfig(epochs=chosen.epochs, batch_size=32, learning_rate=0.02, schedule="one_cycle"),
    )
    evaluation = train(config, chosen.out)  # the same as `netfission train`; shows its progress
    assert evaluation is not None
    print(evaluation.table())

    classifier = nf.Classifier.from_pretrained(chosen.out)
    files = sorted((folder / "test").rglob("*.*"))[::40] if (folder / "test").is_dir() else []
    for file in files:
        with Image.open(file) as image:
            prediction = classifier.predict(classifier.pixels(image).unsqueeze(0), risk=0.05)
        names = [classifier.spec.classes[vote] for vote in prediction.votes[0]]
        answer = classifier.spec.classes[int(prediction.classes[0])]
        doubt = " but it had better be asked a human" if torch.any(prediction.abstains) else ""
        sure = 100 * prediction.confidence[0].item()
        votes = ", ".join(names)
        print(f"{file.parent.name}/{file.name}: {answer}, {sure:.0f} % sure; exits say {votes}{doubt}")
    print(f"wrote {chosen.out}")


if __name__ == "__main__":
    main()
