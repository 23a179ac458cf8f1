import json
from dataclasses import replace

import pytest

from netfission.experiments import demo


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "TRAINING", replace(demo.TRAINING, epochs=1))
        patch.setattr(demo, "MODEL", replace(demo.MODEL, model="wrn-10-1"))
        demo.run_demo(path, seeds=2)
        yield path


def test_the_table_repeats_what_the_runs_measured(short_demo):
    record = json.loads((short_demo / "demo.json").read_text())
    text = (short_demo / "demo.txt").read_text()
    assert [row["name"] for row in record["rows"]] == [
        "single network",
        "three exits",
        "  its exit 0",
        "  its exit 1",
        "  its exit 2",
    ]
    for row, folder in zip(record["rows"], ("single-network", "three-exits-channels"), strict=False):
        runs = [
            json.loads((short_demo / f"{folder}-seed{s}" / "evaluation.json").read_text()) for s in (0, 1)
        ]
        assert row["figures"]["top1"] == [run["ensemble"]["top1"] for run in runs]
        assert f"{50 * sum(row['figures']['top1']):.2f} ±" in text
    single, fissioned = (row["cost"] for row in record["rows"][:2])
    assert fissioned["size"]["macs_dense"] != single["size"]["macs_dense"]
    assert fissioned["size"]["macs_dense"] == pytest.approx(single["size"]["macs_dense"], rel=0.05)
    assert f"{fissioned['inference'][0]['ratio']['median']:.2f}×" in text


def test_the_picture_is_a_png(short_demo):
    assert (short_demo / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_demo_trains_nothing_again(short_demo):
    weights = short_demo / "three-exits-channels-seed1" / "checkpoints" / "last.ckpt"
    before = weights.stat().st_mtime_ns
    record = json.loads((short_demo / "demo.json").read_text())
    demo.run_demo(short_demo, seeds=2)
    assert weights.stat().st_mtime_ns == before
    again = json.loads((short_demo / "demo.json").read_text())
    assert [row["figures"] for row in again["rows"]] == [row["figures"] for row in record["rows"]]
