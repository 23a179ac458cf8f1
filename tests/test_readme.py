"""The README's Python runs as it stands, and its promises about commands hold."""

import math
import re
from pathlib import Path

import pytest
import torch

from netfission.config import FissionConfig
from netfission.surgery.masks import kept_masks

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(block: str) -> dict[str, object]:
    scope: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), scope)
    return scope


def test_the_bare_loop_trains_and_keeps_removed_weights_at_zero():
    loop = run(BLOCKS[0])
    assert loop["logits"].shape == (64, 3, 10)
    assert loop["loss"] < 0.9 * 3 * math.log(10)  # three exits, each at chance
    assert torch.allclose(loop["probabilities"], loop["single"](loop["images"]).softmax(1))
    assert (loop["doubt"] >= 0).all()
    masks = kept_masks(loop["net"])
    assert sum(int((~mask).sum()) for mask in masks.values()) > 0
    for name, mask in masks.items():
        assert not loop["net"].get_parameter(name)[~mask].any()


def test_the_transformer_is_cut_where_it_is_told():
    network = run("import netfission as nf\n" + BLOCKS[1])["net"]
    assert network.stage_names == ("blocks.3", "blocks.7", "blocks.11")


@pytest.mark.parametrize("name", list(FissionConfig.__dataclass_fields__))
def test_every_setting_of_fission_is_explained(name):
    assert f"`{name}`" in README


def test_every_flag_shown_exists():
    from netfission.cli import parser as whole_parser

    for command in re.findall(r"^netfission (train .*?)(?:\s{2,}#.*)?$", README, re.MULTILINE):
        whole_parser().parse_args(command.split())
