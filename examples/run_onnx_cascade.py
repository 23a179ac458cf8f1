"""Classify images by an exported cascade, exit by exit; needs onnxruntime, numpy and Pillow alone.

python run_onnx_cascade.py cascade cat.jpg dog.png
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from run_onnx import read


class Cascade:
    """The graphs in a folder, run one after another for the images that are not sure yet."""

    def __init__(self, folder):
        self.about = json.loads((folder / "cascade.json").read_text(encoding="utf-8"))
        self.sessions = [
            onnxruntime.InferenceSession(folder / step["file"], providers=["CPUExecutionProvider"])
            for step in self.about["steps"]
        ]

    def __call__(self, pixels):
        """Pixels, `(n, channels, height, width)` uint8 → probabilities `(n, classes)`, exits used `(n,)`."""
        probabilities = np.empty((len(pixels), len(self.about["classes"])), np.float32)
        used = np.empty(len(pixels), np.int64)
        rows, state = np.arange(len(pixels)), {"images": pixels}
        for number, (step, session) in enumerate(
            zip(self.about["steps"], self.sessions, strict=True), start=1
        ):
            found = session.run(step["outputs"], {name: state[name] for name in step["inputs"]})
            state |= dict(zip(step["outputs"], found, strict=True))
            probabilities[rows], used[rows] = state["probabilities"], number
            if step["stops_above"] is None:
                break
            going = state["confidence"] <= np.float32(step["stops_above"])
            rows, state = rows[going], {name: state[name][going] for name in step["keeps"]}
            if not len(rows):
                break
        return probabilities, used


def main():
    """Print class, probability and exits used of each image; returns 1 where one cannot be read, else 0."""
    folder, *files = sys.argv[1:]
    cascade = Cascade(Path(folder))
    good = read(files, cascade.about["preprocessing"])
    answers = zip(*cascade(np.stack([pixels for _, pixels in good])), strict=True) if good else []
    for (file, _), (probabilities, exits) in zip(good, answers, strict=True):
        name = cascade.about["classes"][probabilities.argmax()]
        print(
            f"{file}: {name}, probability {probabilities.max():.4f}, {exits} of {len(cascade.sessions)} exits"
        )
    return int(len(good) < len(files))


if __name__ == "__main__":
    sys.exit(main())
