from pathlib import Path

import pytest

from netfission.utils.plot_style import mark_reference, new_figure, picture_files, save_picture


def picture():
    figure, axes = new_figure((3, 2), columns=2, sharey=True)
    axes[0, 0].plot([0, 1], [0, 2], label="two")
    axes[0, 0].set_xlim(0, 0.5)  # so that the SVG refers to a clip path
    mark_reference(axes[0, 1], x=0.5)
    return figure


def test_the_same_figure_gives_the_same_files():
    files = picture_files(picture(), Path("cost.any"))
    assert [path.name for path in files] == ["cost.png", "cost.svg"]
    assert files == picture_files(picture(), Path("cost.any"))


def test_names_are_drawn_as_they_are_and_never_as_mathematics():
    figure = picture()
    figure.suptitle(r"m$\frac$ of $x_1$")  # the first is no formula, so that drawing it would fail
    figure.axes[0].set_xlabel("$y_2$")
    (svg,) = picture_files(figure, Path("cost"), ["svg"]).values()
    assert isinstance(svg, bytes) and rb"<!-- m$\frac$ of $x_1$ -->" in svg and b"<!-- $y_2$ -->" in svg


def test_axes_have_no_spine_at_the_top_and_right():
    for axes in picture().axes:
        assert [name for name, spine in axes.spines.items() if spine.get_visible()] == ["left", "bottom"]


def test_a_picture_is_saved_as_png_and_svg_or_not_at_all(tmp_path):
    assert save_picture(picture(), tmp_path / "cost") == [tmp_path / "cost.png", tmp_path / "cost.svg"]
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "cost.svg").read_bytes()

    (tmp_path / "time.svg").mkdir()
    with pytest.raises(ValueError, match=r"time\.svg must be a regular file, got a folder"):
        save_picture(picture(), tmp_path / "time")
    assert not (tmp_path / "time.svg").is_file()


def test_other_kinds_can_be_chosen(tmp_path):
    assert save_picture(picture(), tmp_path / "cost", ["png"]) == [tmp_path / "cost.png"]
    assert list(tmp_path.iterdir()) == [tmp_path / "cost.png"]
