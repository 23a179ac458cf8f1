"""Classify images with an exported network; needs onnxruntime, numpy and Pillow alone.

python run_onnx.py model.onnx cat.jpg dog.png --risk 0.05
"""

import argparse
import json
import sys
import warnings

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def to_pixels(image, preprocessing):
    """An image as the network takes it, `(channels, height, width)` uint8."""
    size = preprocessing["width"], preprocessing["height"]
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, of which the upper 8 are taken
        image = Image.fromarray((np.array(image).clip(0, 65535) // 256).astype(np.uint8))
    elif image.mode == "F":
        values = np.array(image)
        if not np.isfinite(values).all():
            raise ValueError("it has pixels that are no finite numbers")
        if values.min() >= 0 and values.max() <= 1:
            image = Image.fromarray((255 * values).round().astype(np.uint8))
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
    image = image.convert(preprocessing["mode"])
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)  # covers the size, takes the centre
    return np.array(image).reshape(size[1], size[0], -1).transpose(2, 0, 1)


def read(files, preprocessing):
    """Names and pixels of the images that can be read; says why of the others."""
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    good = []
    for file in files:
        try:
            with Image.open(file) as image:
                good.append((file, to_pixels(image, preprocessing)))
        except Exception as error:  # decoders raise errors of many kinds
            print(f"{file}: cannot be read ({' '.join(str(error).split())})", file=sys.stderr)
    return good


def threshold(curve, risk):
    """The least probability to answer, so that of the answers at most a share `risk` is wrong."""
    good = [level for level, wrong in zip(curve["thresholds"], curve["risk"], strict=True) if wrong <= risk]
    return good[-1] if good else 2.0


def main():
    """Print class, probability, votes and doubt of each image; returns 1 where one cannot be read, else 0."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("model")
    arguments.add_argument("images", nargs="+")
    arguments.add_argument(
        "--risk", type=float, help="share of wrong answers that is borne, else it abstains"
    )
    given = arguments.parse_args()

    if given.risk is not None and not 0 <= given.risk <= 1:
        arguments.error(f"--risk {given.risk}: takes a share from 0 to 1")
    try:
        session = onnxruntime.InferenceSession(given.model, providers=["CPUExecutionProvider"])
        about = json.loads(session.get_modelmeta().custom_metadata_map["netfission"])
    except Exception as error:  # onnxruntime's own kinds; or there is no such description
        arguments.error(
            f"{given.model}: is no network exported by netfission ({' '.join(str(error).split())})"
        )
    names, least = about["classes"], 0.0
    if given.risk is not None:
        if about["risk_coverage"] is None:
            arguments.error("--risk takes a network that was calibrated on a validation split")
        least = threshold(about["risk_coverage"], given.risk)

    good = read(given.images, about["preprocessing"])
    outputs = [output.name for output in session.get_outputs()]
    pixels = [pixels for _, pixels in good]
    found = (
        dict(zip(outputs, session.run(outputs, {"images": np.stack(pixels)}), strict=True)) if good else {}
    )
    for row, (file, _) in enumerate(good):
        best = found["classes"][row]
        probability = found["probabilities"][row, best]
        answer = names[best] if probability >= least else "abstains"
        votes = ", ".join(names[vote] for vote in found["votes"][row])
        print(
            f"{file}: {answer}, probability {probability:.4f}; exits vote {votes}; disagreement "
            f"{found['disagreement'][row]:.3f}, entropy {found['entropy'][row]:.4f} nats"
        )
    return int(len(good) < len(given.images))


if __name__ == "__main__":
    sys.exit(main())
