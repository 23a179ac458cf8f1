"""Classify images with an exported network; needs onnxruntime, numpy and Pillow alone.

python run_onnx.py model.onnx cat.jpg dog.png --risk 0.05
"""

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def to_pixels(image, preprocessing):
    """An image as the network takes it, `(channels, height, width)` uint8."""
    size = preprocessing["width"], preprocessing["height"]
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, of which the upper 8 are taken
        image = Image.fromarray((np.array(image).clip(0, 65535) // 256).astype(np.uint8))
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
    image = image.convert(preprocessing["mode"])
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)  # covers the size, takes the centre
    return np.array(image).reshape(size[1], size[0], -1).transpose(2, 0, 1)


def threshold(curve, risk):
    """The least probability to answer, so that of the answers at most a share `risk` is wrong."""
    good = [level for level, wrong in zip(curve["thresholds"], curve["risk"], strict=True) if wrong <= risk]
    return good[-1] if good else 2.0


def main():
    """Print class, probability, votes and doubt of each image."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("model")
    arguments.add_argument("images", nargs="+")
    arguments.add_argument(
        "--risk", type=float, help="share of wrong answers that is borne, else it abstains"
    )
    given = arguments.parse_args()

    session = onnxruntime.InferenceSession(given.model, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["netfission"])
    names, least = about["classes"], 0.0
    if given.risk is not None:
        if about["risk_coverage"] is None:
            arguments.error("--risk takes a network that was calibrated on a validation split")
        least = threshold(about["risk_coverage"], given.risk)

    pixels = np.stack([to_pixels(Image.open(file), about["preprocessing"]) for file in given.images])
    outputs = [output.name for output in session.get_outputs()]
    found = dict(zip(outputs, session.run(outputs, {"images": pixels}), strict=True))
    for row, file in enumerate(given.images):
        best = found["classes"][row]
        probability = found["probabilities"][row, best]
        answer = names[best] if probability >= least else "abstains"
        votes = ", ".join(names[vote] for vote in found["votes"][row])
        print(
            f"{file}: {answer}, probability {probability:.4f}; exits vote {votes}; disagreement "
            f"{found['disagreement'][row]:.3f}, entropy {found['entropy'][row]:.4f} nats"
        )


if __name__ == "__main__":
    main()
