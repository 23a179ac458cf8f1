"""Predict with an exported cascade, exit by exit; needs only onnxruntime, NumPy and Pillow.

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
            Name → answers `(n, …)`, as `answers` in the metadata names them, and the number of exits used,
            `(n,)`.
        """
        answers, used = {}, np.empty(len(pixels), np.int64)
        rows, state = np.arange(len(pixels)), {"images": pixels}
        for number, (step, session) in enumerate(
            zip(self.metadata["steps"], self.sessions, strict=True), start=1
        ):
            arrays = session.run(step["outputs"], {name: state[name] for name in step["inputs"]})
            state |= dict(zip(step["outputs"], arrays, strict=True))
            for name in self.metadata["answers"]:
                answers.setdefault(name, np.empty_like(state[name]))[rows] = state[name]
            used[rows] = number
            if step["threshold"] is None:
                break
            continues = state["confidence"] <= np.float32(step["threshold"])
            rows, state = rows[continues], {name: state[name][continues] for name in step["keeps"]}
            if not len(rows):
                break
        return answers, used


def describe(answer, metadata):
    """Return the answer for an image in words: class, labels, numbers, or the largest part of its pixels."""
    names = metadata["classes"]
    if "mean" in answer:
        numbers = zip(names, answer["mean"], answer["std"], strict=True)
        return ", ".join(f"{name} {mean:.4g} ± {std:.2g}" for name, mean, std in numbers)
    if "labels" in answer:
        given = zip(names, answer["labels"], answer["probabilities"], strict=True)
        return ", ".join(f"{name} {value:.4f}" for name, has, value in given if has) or "no label"
    if answer["probabilities"].ndim > 1:  # of each pixel
        shares = np.bincount(answer["probabilities"].argmax(axis=0).ravel(), minlength=len(names))
        return (
            f"{names[shares.argmax()]} at {100 * shares.max() / shares.sum():.1f} % of the network's pixels"
        )
    return f"{names[answer['classes']]}, probability {answer['probabilities'].max():.4f}"


def main():
    """Print answer and exits used of each image; return 1 if one cannot be read, else 0."""
    folder, *files = sys.argv[1:]
    cascade = Cascade(Path(folder))
    images = read(files, cascade.metadata["preprocessing"])
    if images:
        answers, used = cascade(np.stack([pixels for _, pixels in images]))
        for row, (file, _) in enumerate(images):
            answer = describe({name: values[row] for name, values in answers.items()}, cascade.metadata)
            print(f"{file}: {answer}, {used[row]} of {len(cascade.sessions)} exits")
    return int(len(images) < len(files))


if __name__ == "__main__":
    sys.exit(main())
