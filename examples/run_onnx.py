"""Classify images with an exported network; needs only onnxruntime, NumPy and Pillow.

python examples/run_onnx.py model.onnx cat.jpg dog.png --risk 0.05
"""

import argparse
import json
import sys
import warnings

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def to_pixels(image, preprocessing):
    """Return an image as the network's pixels, uint8 `(channels, height, width)`."""
    size = preprocessing["width"], preprocessing["height"]
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits: keep the upper 8
        image = Image.fromarray((np.array(image).clip(0, 65535) // 256).astype(np.uint8))
    elif image.mode == "F":
        values = np.array(image)
        if not np.isfinite(values).all():
            raise ValueError("pixels must be finite, got NaN or infinity")
        if values.min() >= 0 and values.max() <= 1:
            image = Image.fromarray((255 * values).round().astype(np.uint8))
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
    image = image.convert(preprocessing["mode"])
    if not preprocessing.get("crops", True):  # scale to fit into the size, black at the right or below
        factor = min(size[0] / image.width, size[1] / image.height)
        inner = tuple(max(1, round(factor * side)) for side in image.size)
        fitted = Image.new(image.mode, size)
        fitted.paste(image if image.size == inner else image.resize(inner, Image.Resampling.BILINEAR))
        image = fitted
    if image.size != size:
        image = ImageOps.fit(
            image, size, Image.Resampling.BILINEAR
        )  # scale to cover the size, and crop the centre
    return np.array(image).reshape(size[1], size[0], -1).transpose(2, 0, 1)


def read(files, preprocessing):
    """Return names and pixels of the images that can be read; print why others cannot."""
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                images.append((file, to_pixels(image, preprocessing)))
        except Exception as error:  # decoders raise errors of many kinds
            print(f"{file}: cannot be read ({' '.join(str(error).split())})", file=sys.stderr)
    return images


def threshold(curve, risk):
    """Return the lowest threshold of confidence at which at most a share `risk` of the answers is wrong."""
    levels = zip(curve["thresholds"], curve["risk"], strict=True)
    possible = [level for level, level_risk in levels if level_risk <= risk]
    return possible[-1] if possible else 2.0  # no confidence reaches 2: never answer


def main():
    """Print class, probability, votes and uncertainty per image; return 1 if one cannot be read, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("images", nargs="+")
    parser.add_argument(
        "--risk", type=float, help="target share of wrong answers; the network abstains above"
    )
    arguments = parser.parse_args()

    if arguments.risk is not None and not 0 <= arguments.risk <= 1:
        parser.error(f"--risk must be a share from 0 to 1, got {arguments.risk}")
    try:
        session = onnxruntime.InferenceSession(arguments.model, providers=["CPUExecutionProvider"])
        metadata = json.loads(session.get_modelmeta().custom_metadata_map["netfission"])
    except Exception as error:  # onnxruntime's own kinds; or there is no such metadata
        reason = " ".join(str(error).split())
        parser.error(f"{arguments.model} must be a network exported by netfission, got an error ({reason})")
    names, least_confidence = metadata["classes"], 0.0
    if arguments.risk is not None:
        if metadata["risk_coverage"] is None:
            parser.error("--risk must be left out if the network was not calibrated on a validation split")
        least_confidence = threshold(metadata["risk_coverage"], arguments.risk)

    images = read(arguments.images, metadata["preprocessing"])
    names_of_outputs = [output.name for output in session.get_outputs()]
    outputs = {}
    if images:
        arrays = session.run(names_of_outputs, {"images": np.stack([pixels for _, pixels in images])})
        outputs = dict(zip(names_of_outputs, arrays, strict=True))
    for row, (file, _) in enumerate(images):
        best = outputs["classes"][row]
        probability = outputs["probabilities"][row, best]
        answer = names[best] if probability >= least_confidence else "abstains"
        votes = ", ".join(names[vote] for vote in outputs["votes"][row])
        print(
            f"{file}: {answer}, probability {probability:.4f}; exits vote {votes}; disagreement "
            f"{outputs['disagreement'][row]:.3f}, entropy {outputs['entropy'][row]:.4f} nats"
        )
    return int(len(images) < len(arguments.images))


if __name__ == "__main__":
    sys.exit(main())
