from itertools import pairwise

import pytest
import torch

import netfission as nf
from netfission.profiling.cost import count, count_parameters
from netfission.profiling.macs import count_macs
from netfission.report.diagram import lay_out, short
from netfission.report.run_data import Run, load_runs


@pytest.fixture(scope="module")
def loaded(finished_run):
    return load_runs([finished_run], Run)[0]


def test_parts_add_up_to_the_network_and_exits_to_what_they_run(loaded):
    image = torch.zeros(1, *loaded.spec.shape)
    costs = loaded.costs
    parts = [part.total for part in costs.parts]
    assert sum(part.parameters_stored for part in parts) == count_parameters(loaded.network)[0]
    assert sum(part.parameters_nonzero for part in parts) == count_parameters(loaded.network)[1]
    assert sum(part.macs_effective for part in parts) == count_macs(loaded.network, image).effective
    for number, size in enumerate(each.alone for each in costs.exits):
        order = (number, *(other for other in range(loaded.exits) if other != number))
        alone = nf.exit_costs(loaded.network, image, order)
        assert (size.macs_dense, size.macs_effective) == (alone.dense[0], alone.effective[0])


def test_a_network_that_is_not_fissioned_has_a_size_and_no_parts(loaded):
    costs = count(loaded.spec.single().eval(), torch.zeros(1, *loaded.spec.shape))
    assert (costs.parts, costs.exits) == ((), ())
    assert costs.size.parameters_stored > 0


def test_boxes_are_as_large_as_what_they_hold(loaded):
    drawing = lay_out(loaded)
    sizes = [size for part in loaded.costs.parts for size in part.paths if size]
    assert len(drawing.boxes) == len(sizes)
    largest = max(size.parameters_stored for size in sizes)
    side = max(box.side for box in drawing.boxes)
    for box, size in zip(drawing.boxes, sizes, strict=True):
        if box.side > 3:
            assert (box.side / side) ** 2 == pytest.approx(size.parameters_stored / largest)


def test_shared_boxes_are_grey_and_own_ones_have_their_exits_colour(loaded):
    drawing = lay_out(loaded)
    expected = [
        "muted" if None in part.paths else f"exit{number}"
        for part in loaded.costs.parts
        for number, size in enumerate(part.paths)
        if size
    ]
    assert [box.colour for box in drawing.boxes] == expected
    assert {"muted", "exit0", "exit1"} == set(expected)


def test_nothing_lies_outside_or_upon_another(loaded):
    drawing = lay_out(loaded)
    for box in drawing.boxes:
        assert box.x - box.side / 2 >= 0 and box.x + box.side / 2 <= drawing.width
        assert box.y - box.side / 2 >= 0 and box.y + box.side / 2 <= drawing.height
    spans = {(box.x, box.y - box.side / 2, box.y + box.side / 2) for box in drawing.boxes}
    for x in {box.x for box in drawing.boxes}:
        column = sorted(span[1:] for span in spans if span[0] == x)
        assert all(above[1] < below[0] for above, below in pairwise(column))
    assert [badge.name for badge in drawing.badges] == ["0", "1", "E"]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (691, "691"),
        (999, "999"),
        (999.6, "1.00 k"),
        (1000, "1.00 k"),
        (34_512, "34.5 k"),
        (999_600, "1.00 M"),
        (6_300_000, "6.30 M"),
        (99_960_000, "100 M"),
        (1_234_000_000, "1.23 G"),
    ],
)
def test_counts_are_given_in_three_digits(number, text):
    assert short(number) == text
