import base64
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from netfission.classifier import Classifier
from netfission.data import TensorSplit, load_data
from netfission.report import votes
from netfission.report.votes import collect_votes


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


@pytest.fixture(scope="module")
def classifier(finished_run):
    return Classifier.from_pretrained(finished_run)


def decoded(address: str) -> np.ndarray:
    kind, content = address.split(",")
    assert kind == "data:image/png;base64"
    return np.array(Image.open(io.BytesIO(base64.b64decode(content))))


def test_votes_are_those_of_the_network(classifier, digits):
    found = collect_votes(classifier, digits)
    logits = classifier.logits(digits.test.images)
    answers, labels = logits.argmax(dim=2), digits.test.labels
    agree = (answers == answers[:, :1]).all(dim=1)
    right = logits.mean(dim=1).argmax(dim=1) == labels
    assert 0 < found.agreed < found.n == found.total == len(labels)
    assert found.agreed == int(agree.sum())
    assert found.right_agreed == int((agree & right).sum())
    assert found.right_disagreed == int((~agree & right).sum())


def test_an_example_is_an_image_of_the_split_with_its_votes(classifier, digits):
    found = collect_votes(classifier, digits)
    assert found.right and found.wrong
    for each in [*found.right, *found.wrong]:
        pixels = torch.from_numpy(decoded(each.image))
        (row,) = (digits.test.images[:, 0] == pixels).all(dim=2).all(dim=1).nonzero()[:1].flatten()
        assert each.label == digits.classes[digits.test.labels[row]]
        logits = classifier.logits(digits.test.images[row : row + 1])[0] / classifier.temperature
        shown = [*each.exits, each.ensemble]
        for vote, own in zip(shown, [*logits, logits.mean(dim=0)], strict=True):
            probability, answer = own.softmax(dim=0).max(dim=0)
            assert vote.name == digits.classes[answer]
            assert vote.probability == pytest.approx(probability.item(), abs=1e-4)
            assert vote.right == (vote.name == each.label)
        assert len({vote.name for vote in each.exits}) > 1
    assert all(each.ensemble.right for each in found.right)
    assert not any(each.ensemble.right for each in found.wrong)


def test_many_images_are_sampled_evenly(classifier, digits, monkeypatch):
    monkeypatch.setattr(votes, "MAX_IMAGES", 7)
    sorted_ = digits.test.labels.argsort()
    data = replace(digits, test=TensorSplit(digits.test.images[sorted_], digits.test.labels[sorted_]))
    seen = []
    monkeypatch.setattr(
        classifier, "logits", lambda pixels: (seen.append(pixels), torch.eye(10)[:7, None])[1]
    )
    found = collect_votes(classifier, data)
    assert (found.n, found.total) == (7, len(sorted_))
    rows = [int((data.test.images == image).flatten(1).all(dim=1).nonzero()[0]) for image in seen[0]]
    assert rows == [index * found.total // 7 for index in range(7)]


def test_large_images_are_made_small_and_keep_their_shape():
    picture = decoded(votes._png(torch.zeros(3, 300, 200, dtype=torch.uint8)))
    assert picture.shape == (112, 75, 3)
