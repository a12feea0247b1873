"""Images of the user's own, one folder per class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from intact.data import load_dataset
from intact.data.folder import load
from intact.errors import DataError


def paint(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (8, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def split_tree(tmp_path: Path) -> Path:
    """Two classes, made in the wrong order; the red channel tells the image."""
    for part, start in (("train", 0), ("test", 100)):
        for c, name in ((1, "dog"), (0, "cat")):
            for i in (2, 0, 1):
                paint(tmp_path / part / name / f"{i}.png", (start + 10 * c + i, 7, 9))
    return tmp_path


@pytest.fixture
def single_tree(tmp_path: Path) -> Path:
    for c, (name, number) in enumerate((("a", 5), ("b", 11))):
        for i in range(number):
            paint(tmp_path / name / f"{i:02}.png", (20 * c + i, 0, 0))
    return tmp_path


def reds(images: np.ndarray) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def test_train_and_test_are_read_in_the_order_of_names(split_tree):
    data = load_dataset("folder", split_tree)
    assert data.classes == ("cat", "dog")
    assert data.train_images.shape == (6, 3, 32, 32)
    assert reds(data.train_images) == [0, 1, 2, 10, 11, 12]
    assert reds(data.test_images) == [100, 101, 102, 110, 111, 112]
    assert data.train_labels.tolist() == data.test_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (data.train_images[:, 1] == 7).all()
    assert (data.train_images[:, 2] == 9).all()


def test_of_a_single_tree_every_fifth_image_of_a_class_is_for_the_test(single_tree):
    data = load(single_tree)
    assert data.classes == ("a", "b")
    assert reds(data.test_images) == [4, 24, 29]
    assert reds(data.train_images) == [0, 1, 2, 3, 20, 21, 22, 23, 25, 26, 27, 28, 30]
    assert data.test_labels.tolist() == [0, 1, 1]
    assert data.sha256 == load(single_tree).sha256


def test_images_are_resized_to_the_size_that_is_asked_for(single_tree):
    assert load(single_tree, size=5).train_images.shape[1:] == (3, 5, 5)


def test_rows_and_columns_stay_what_they_are(single_tree):
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0, 3] = (200, 0, 0)  # row 0, column 3
    Image.fromarray(pixels).save(single_tree / "a" / "00.png")
    assert load(single_tree, size=4).train_images[0, 0, 0, 3] == 200


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_images_of_any_mode_become_rgb(single_tree, mode):
    Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(single_tree / "a" / "00.png")
    assert (load(single_tree).train_images[0] == 255).all()


def test_files_that_are_no_images_by_their_name_are_passed_over(single_tree):
    (single_tree / "a" / "notes.txt").write_text("mine")
    (single_tree / "a" / ".hidden.png").write_bytes(b"")
    (single_tree / ".cache").mkdir()
    (single_tree / "README").write_text("mine")
    assert len(load(single_tree).train_images) == 13


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_cannot_be_decoded_is_named(single_tree, content):
    (single_tree / "b" / "03.png").write_bytes(content)
    with pytest.raises(DataError, match=r"b/03\.png cannot be read as an image.* remove the file"):
        load(single_tree)


def test_an_image_cut_short_is_named(single_tree):
    path = single_tree / "b" / "04.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"b/04\.png cannot be read as an image"):
        load(single_tree)


def test_a_class_without_images_is_named(split_tree):
    (split_tree / "train" / "bird").mkdir()
    with pytest.raises(DataError, match=r"train/bird holds no images"):
        load(split_tree)


def test_a_class_too_small_to_split_is_named(single_tree):
    (single_tree / "a" / "00.png").unlink()
    with pytest.raises(DataError, match="class 'a' has 4 images, but at least 5 are needed"):
        load(single_tree)


def test_classes_that_only_one_part_has_are_named(split_tree):
    paint(split_tree / "test" / "fox" / "0.png", (0, 0, 0))
    with pytest.raises(DataError, match="only one of them has fox"):
        load(split_tree)


def test_an_empty_folder_is_refused_with_what_it_should_hold(tmp_path):
    with pytest.raises(DataError, match=r"holds no folders\. It must hold one per class"):
        load(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere cannot be read: No such file"):
        load(tmp_path / "nowhere")


def test_the_folder_must_be_said():
    with pytest.raises(DataError, match="needs a data folder"):
        load_dataset("folder")
