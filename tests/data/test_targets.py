"""Tables of several labels or of numbers: what is read, and what is refused in one line."""

import numpy as np
import pytest
from PIL import Image

from netfission.data.load import load_data
from netfission.data.sources import find_targets
from netfission.data.targets import LABELS, NUMBERS, read_labels, read_numbers


@pytest.fixture
def table(tmp_path):
    """Text → a table beside ten small images 0.png to 9.png."""
    for number in range(10):
        Image.fromarray(np.full((4, 4, 3), 20 * number, np.uint8)).save(tmp_path / f"{number}.png")

    def write(text):
        path = tmp_path / "images.csv"
        path.write_text(text)
        return path

    return write


def rows(cells, header):
    return "\n".join([header, *(f"{number}.png,{cell}" for number, cell in enumerate(cells))])


def test_one_column_of_names_and_one_column_per_label_say_the_same(table):
    named = read_labels(table("path,labels\n0.png,tree|car\n1.png,\n2.png, car \n"))
    numbered = read_labels(table("path,car,tree\n0.png,1,1\n1.png,0,0\n2.png,true,0.0\n"))
    assert named.names == numbered.names == ["car", "tree"]
    assert [row.label for row in named.rows] == [row.label for row in numbered.rows] == ["1 1", "0 0", "1 0"]


def test_the_columns_of_labels_may_be_separated_by_semicolons_and_have_splits(table):
    found = read_labels(table("split;image;car\ntrain;0.png;1\ntest;1.png;0\n"))
    assert found.names == ["car"] and [row.split for row in found.rows] == ["train", "test"]


def test_several_numbers_are_read(table):
    found = read_numbers(table("path,road,sky\n0.png,0.25,-1e3\n"))
    assert found.names == ["road", "sky"] and found.rows[0].label == "0.25 -1000"


def test_whole_numbers_as_names_of_labels_have_no_point(table):
    found = read_labels(table("path,labels\n0.png,1.0\n1.png,1|2\n2.png,\n"))
    assert found.names == ["1", "2"] and [row.label for row in found.rows] == ["1 0", "1 1", "0 0"]
    assert read_labels(table("path,labels\n0.png,1.0\n1.png,1|cat\n")).names == ["1", "1.0", "cat"]


def test_empty_cells_at_the_end_of_a_row_are_left_out(table):
    assert read_numbers(table("path,road\n0.png,1,, \n")).rows[0].label == "1"


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (read_labels, "path,car\n0.png,2\n", "0 or 1 per label, got '2' for car in row 2"),
        (read_labels, "path,car\n0.png,nan\n", "0 or 1 per label, got 'nan' for car in row 2"),
        (read_labels, "path,car,tree\n0.png,1\n", "got no value for tree in row 2"),
        (
            read_labels,
            "path,labels,width\n0.png,car,3\n",
            "names of labels, or .* columns labels and width",
        ),
        (read_labels, "path,labels\n0.png,\n", "a table with names of labels, got none"),
        (read_labels, "path\n0.png\n", "columns of targets, of different names, got the column path alone"),
        (read_labels, "path,car,car\n0.png,1,1\n", "of different names, got two columns of one name"),
        (read_labels, "car,tree\n1,1\n", "a table with a column of file names"),
        (
            read_numbers,
            "path,road\n0.png,nan\n",
            r"a finite number \(float32\) per target, got 'nan' for road in row 2",
        ),
        (
            read_numbers,
            "path,road\n0.png,inf\n",
            r"a finite number \(float32\) per target, got 'inf' for road in row 2",
        ),
        (
            read_numbers,
            "path,label\n0.png,cat\n",
            r"a finite number \(float32\) per target, got 'cat' for label in row 2",
        ),
        (read_numbers, "path,road\n0.png,\n", "got no value for road in row 2"),
        (read_numbers, "path,road\n0.png,1e39\n", r"finite number \(float32\) .* got '1e39' for road"),
        (
            read_numbers,
            "path,road\n0.png,0,25\n",
            "2 cells per row, got 3 in row 2; write numbers with a dec",
        ),
        (read_labels, "path,car\n0.png,1\n1.png,0,1\n", "2 cells per row, got 3 in row 3"),
        (read_labels, 'path,labels\n0.png,"car\n1.png,tree\n', r"one line, got .* near row 2; a quotation"),
        (read_numbers, 'path,road\n"0.png,1\n1.png,2\n', r"one line, got .* near row 2; a quotation"),
        (
            read_labels,
            "path,labels\n0.png,car|nan\n",
            "names of labels, got nan in row 2; leave the cell empty",
        ),
    ],
)
def test_other_tables_are_refused_with_the_row(table, read, text, message):
    with pytest.raises(ValueError, match=message):
        read(table(text))


def test_a_file_that_does_not_exist_is_named(table):
    with pytest.raises(ValueError, match=r"a table of files that exist, got no 99\.png \(row 3\)"):
        find_targets(str(table("path,road\n0.png,1\n99.png,2\n")), NUMBERS)


def test_an_image_with_two_targets_is_refused(table):
    with pytest.raises(ValueError, match="one label per image"):
        find_targets(str(table("path,road\n0.png,1\n0.png,2\n")), NUMBERS)


def test_targets_stay_with_their_images(table):
    data = load_data(str(table(rows(range(10), "path,road"))), targets=NUMBERS, validation=0.25)
    for split in (data.train, data.validation, data.test):
        assert split.labels.shape == (len(split), 1)
        assert (split.images[:, 0, 0, 0] == 20 * split.labels[:, 0]).all()
    assert [len(split) for split in (data.train, data.validation, data.test)] == [6, 2, 2]


def test_a_streamed_split_gives_the_same_targets(table):
    path = str(table(rows(range(10), "path,road")))
    held, streamed = (load_data(path, targets=NUMBERS, memory_limit=limit) for limit in (1 << 30, 0))
    assert all((streamed.train[row][1] == held.train.labels[row]).all() for row in range(len(held.train)))


def test_labels_that_never_or_always_occur_are_named(table):
    data = load_data(str(table(rows(["1,0"] * 10, "path,road,bus"))), targets=LABELS)
    assert data.summary.warnings[:2] == [
        "no training image has the label bus",
        "all training images have the label road",
    ]
    assert data.summary.line().startswith("found 10 images with 2 labels (road, bus) in ")
    assert "rarest label: bus (0 training images)" in data.summary.line()


def test_labels_that_look_like_several_are_named(table):
    cells = ["car;tree", "tree;car", "bus"] + ["car"] * 7
    remarks = load_data(str(table(rows(cells, "path,labels"))), targets=LABELS).summary.warnings
    assert "car;tree is one label, and 1 more like it: only | separates names" in remarks


def test_a_single_label_is_refused(table):
    with pytest.raises(ValueError, match=r"data must be a data set of at least 2 labels, got 1 \(car\)"):
        load_data(str(table(rows([0, 1] * 5, "path,car"))), targets=LABELS)


def test_a_number_that_never_differs_is_refused(table):
    with pytest.raises(ValueError, match=r"road must be a target that differs between images, got 0\.5"):
        load_data(str(table(rows([0.5] * 10, "path,road"))), targets=NUMBERS)


def test_copies_with_other_targets_are_named(table, tmp_path):
    path = table(rows(range(10), "path,road"))
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes())
    remarks = load_data(str(path), targets=NUMBERS).summary.warnings
    assert any("content of an image with other targets, such as 0.png and 1.png" in text for text in remarks)
