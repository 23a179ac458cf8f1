"""Classify images with an exported cascade, exit by exit; needs only onnxruntime, NumPy and Pillow.

python examples/run_onnx_cascade.py cascade cat.jpg dog.png
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from run_onnx import read


class Cascade:
    """The graphs in a folder, run one after another for the images whose confidence is still too low."""

    def __init__(self, folder):
        self.metadata = json.loads((folder / "cascade.json").read_text(encoding="utf-8"))
        self.sessions = [
            onnxruntime.InferenceSession(folder / step["file"], providers=["CPUExecutionProvider"])
            for step in self.metadata["steps"]
        ]

    def __call__(self, pixels):
        """Run the cascade.

        Args:
            pixels: uint8 `(n, channels, height, width)`.

        Returns:
            Probabilities, `(n, classes)`, and the number of exits used, `(n,)`.
        """
        probabilities = np.empty((len(pixels), len(self.metadata["classes"])), np.float32)
        used = np.empty(len(pixels), np.int64)
        rows, state = np.arange(len(pixels)), {"images": pixels}
        for number, (step, session) in enumerate(
            zip(self.metadata["steps"], self.sessions, strict=True), start=1
        ):
            arrays = session.run(step["outputs"], {name: state[name] for name in step["inputs"]})
            state |= dict(zip(step["outputs"], arrays, strict=True))
            probabilities[rows], used[rows] = state["probabilities"], number
            if step["threshold"] is None:
                break
            continues = state["confidence"] <= np.float32(step["threshold"])
            rows, state = rows[continues], {name: state[name][continues] for name in step["keeps"]}
            if not len(rows):
                break
        return probabilities, used


def main():
    """Print class, probability and exits used of each image; return 1 if one cannot be read, else 0."""
    folder, *files = sys.argv[1:]
    cascade = Cascade(Path(folder))
    images = read(files, cascade.metadata["preprocessing"])
    answers = zip(*cascade(np.stack([pixels for _, pixels in images])), strict=True) if images else []
    for (file, _), (probabilities, exits) in zip(images, answers, strict=True):
        name = cascade.metadata["classes"][probabilities.argmax()]
        print(
            f"{file}: {name}, probability {probabilities.max():.4f}, {exits} of {len(cascade.sessions)} exits"
        )
    return int(len(images) < len(files))


if __name__ == "__main__":
    sys.exit(main())
