"""Samples of several inputs: an array for each, called as it is, and nothing guessed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from intact.data import spread
from intact.data.hashing import SampleHashes
from intact.data.several import open_several
from intact.errors import DataError

RNG = np.random.default_rng(0)
LEFT, RIGHT = RNG.normal(size=(11, 2, 3)), RNG.normal(size=(11, 4)).astype(np.float16)
LABELS = RNG.integers(0, 9, 11)
SHAPES = {"left": (2, 3), "right": (4,)}


def write(folder: Path, kind: str, arrays: dict[str, np.ndarray]) -> Path:
    """The arrays as a source of a kind."""
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    path = folder / f"both{kind}"
    if kind == ".npz":
        np.savez(path, **arrays)
    elif kind == ".safetensors":
        save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, path)
    else:
        path.mkdir()
        for name, array in arrays.items():
            np.save(path / f"{name}.npy", array)
    return path


@pytest.mark.parametrize("kind", [".npz", ".safetensors", ""])
@pytest.mark.parametrize("known", [True, False])
def test_batches_are_tuples_in_the_order_of_the_inputs(tmp_path, kind, known):
    path = write(tmp_path, kind, {"right": RIGHT, "y": LABELS, "left": LEFT})
    samples = open_several(str(path), SHAPES if known else dict.fromkeys(SHAPES))
    assert (samples.name, samples.count, samples.labelled) == (path.name, 11, True)
    assert (samples.inputs, samples.shape) == (("left", "right"), ((2, 3), (4,)))
    assert samples.shapes == samples.shape
    for _ in range(2):  # again and again
        got = list(samples.batches(4))
        assert [len(labels) for _, labels in got] == [4, 4, 3]
        for x, _ in got:
            assert isinstance(x, tuple)
            assert [part.dtype for part in x] == [np.float32, np.float32]
        for i, whole in enumerate((LEFT, RIGHT)):
            assert np.array_equal(np.concatenate([x[i] for x, _ in got]), whole.astype(np.float32))
        assert np.concatenate([labels for _, labels in got]).tolist() == LABELS.tolist()
    at = spread(11, 3)
    ((names, x),) = samples.take(3).named_batches(5)
    assert names == tuple(str(i) for i in at)
    assert np.array_equal(x[0], LEFT[at].astype(np.float32))
    assert np.array_equal(x[1], RIGHT[at].astype(np.float32))


def test_labels_are_y_or_labels_unless_an_input_is_called_so(tmp_path):
    arrays = {"left": LEFT, "right": RIGHT}
    assert not open_several(write(tmp_path, "", arrays), SHAPES).labelled
    path = write(tmp_path, ".npz", {**arrays, "labels": LABELS})
    assert open_several(path, SHAPES).labelled
    shapes = {"left": (2, 3), "y": (4,)}
    path = write(tmp_path, ".safetensors", {"left": LEFT, "y": RIGHT})
    assert not open_several(path, shapes).labelled
    path = write(tmp_path, ".safetensors", {"left": LEFT, "y": RIGHT, "labels": LABELS})
    ((x, labels),) = open_several(path, shapes).batches(11)
    assert np.array_equal(x[1], RIGHT.astype(np.float32))
    assert labels.tolist() == LABELS.tolist()


def test_a_folder_may_hold_other_files(tmp_path):
    path = write(tmp_path, "", {"left": LEFT, "right": RIGHT})
    (path / "README.txt").write_text("about these")
    (path / ".hidden.npy").write_text("no array")
    assert open_several(path, SHAPES).count == 11


def test_a_folder_may_hold_a_training_and_a_test_part(tmp_path):
    for part, count in (("train", 8), ("test", 3)):
        write(tmp_path, "", {"left": LEFT[:count], "right": RIGHT[:count]}).rename(tmp_path / part)
        assert open_several(tmp_path / part, SHAPES).count == count
    for part, count in (("train", 8), ("test", 3)):
        samples = open_several(tmp_path, SHAPES, part=part)
        assert (samples.name, samples.count) == (f"{tmp_path.name}/{part}", count)
    with pytest.raises(DataError, match="holds train and test: say which of them is meant"):
        open_several(tmp_path, SHAPES)


NAMES = "both.npz holds the arrays {}, but the network's inputs are 'left' and 'right': there must "
LABELLED = "be one array for each, called as it is, and labels, if any, as 'y' or 'labels'. "
RENAME = (
    "Rename of 'a' and 'b' what is meant for 'left' and 'right', each to the name of its input, "
    "and leave out the rest."
)
MISTAKES = {
    "missing": ({"left": LEFT, "y": LABELS}, NAMES.format("'left' and 'y'"), "Add 'right'."),
    "superfluous": (
        {"left": LEFT, "right": RIGHT, "more": LEFT},
        NAMES.format("'left', 'right' and 'more'"),
        "Leave out 'more'.",
    ),
    "another name": (
        {"left": LEFT, "rigth": RIGHT},
        NAMES.format("'left' and 'rigth'"),
        "If 'rigth' is meant for 'right', rename it.",
    ),
    "other names": (
        {"a": LEFT, "b": RIGHT},
        NAMES.format("'a' and 'b'"),
        RENAME,
    ),
    "labels twice": (
        {"left": LEFT, "right": RIGHT, "labels": LABELS, "y": LABELS},
        NAMES.format("'left', 'right', 'labels' and 'y'"),
        "Leave out 'labels'.",
    ),
    "lengths": (
        {"left": LEFT, "right": RIGHT[:-1]},
        "every input must have as many samples, but both.npz holds 11 of 'left', 10 of 'right'.",
        "",
    ),
    "shape": (
        {"left": LEFT.transpose(0, 2, 1), "right": RIGHT},
        "'left' of both.npz holds samples of shape [3, 2], but the network takes [2, 3].",
        "reshape them",
    ),
    "a number": (
        {"left": LEFT, "right": np.float32(1)},
        "'right' of both.npz has the shape [], but arrays of samples are [N, …].",
        "",
    ),
    "whole numbers": (
        {"left": LEFT, "right": np.zeros((11, 4), np.int64)},
        "'right' of both.npz holds int64, but every input of a network with several takes floats",
        "Give float32.",
    ),
    "pixels": (
        {"left": np.zeros((11, 2, 3), np.uint8), "right": RIGHT},
        "'left' of both.npz holds uint8",
        "prepared as in its training",
    ),
    "one-hot": (
        {"left": LEFT, "right": RIGHT, "y": np.eye(11, dtype=np.int64)},
        "both.npz holds labels int64 [11, 11], but labels are",
        "labels.argmax(1)",
    ),
    "none": ({"left": LEFT[:0], "right": RIGHT[:0]}, "both.npz: there are no samples.", ""),
    "objects": (
        {"left": LEFT, "right": np.array([None] * 11)},
        "both.npz cannot be read as an array: it holds no numbers.",
        "",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_errors_that_list_names_and_say_what_to_do(tmp_path, mistake):
    arrays, begins, says = MISTAKES[mistake]
    path = write(tmp_path, ".npz", arrays)
    with pytest.raises(DataError) as raised:
        open_several(path, SHAPES)
    message = str(raised.value).replace(str(path), path.name)
    assert message.startswith(begins)
    if begins.startswith("both.npz holds the arrays"):
        assert message == begins + LABELLED + says
    assert says in message


def test_where_shapes_are_not_known_single_numbers_are_refused(tmp_path):
    path = write(tmp_path, ".npz", {"left": LEFT, "right": np.zeros(11)})
    with pytest.raises(DataError, match=re.escape("[11], but arrays of samples are [N, …]")):
        open_several(path, dict.fromkeys(SHAPES))


def test_an_empty_folder_and_inputs_that_take_all_names_of_labels(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as raised:
        open_several(tmp_path / "empty", {"y": (1,), "labels": (1,)})
    assert str(raised.value) == (
        "empty holds no arrays, but the network's inputs are 'y' and 'labels': there must be one "
        "array for each, called as it is. Add 'y' and 'labels'."
    )


def test_what_is_not_finite_is_found_while_it_is_read(tmp_path):
    spoilt = RIGHT.copy()
    spoilt[7, 2] = np.nan
    samples = open_several(write(tmp_path, "", {"left": LEFT, "right": spoilt}), SHAPES)
    with pytest.raises(DataError, match=r"'right' of both holds a NaN in sample 7, at \[2\]"):
        list(samples.batches(3))


@pytest.mark.parametrize("name", ["digits", "photo.png", "x.npy", "nowhere"])
def test_what_holds_one_input_only_is_refused(tmp_path, name):
    np.save(tmp_path / "x.npy", LEFT)
    with pytest.raises(DataError, match="cannot hold samples of the network's 2 inputs, 'left'"):
        open_several(tmp_path / name, SHAPES)


@pytest.mark.parametrize("kind", [".npz", ".safetensors"])
def test_damaged_and_absent_files_are_named(tmp_path, kind):
    path = tmp_path / f"both{kind}"
    with pytest.raises(DataError, match=f"both{kind} cannot be read as an array"):
        open_several(path, SHAPES)
    path.write_bytes(b"neither")
    with pytest.raises(DataError, match=f"both{kind} cannot be read as an array"):
        open_several(path, SHAPES)


def test_a_damaged_file_of_a_folder_is_named(tmp_path):
    path = write(tmp_path, "", {"left": LEFT})
    (path / "right.npy").write_bytes(b"neither")
    with pytest.raises(DataError, match=r"right\.npy cannot be read as an array"):
        open_several(path, SHAPES)


def test_hashes_of_several_inputs_do_not_depend_on_batches_but_on_every_input(tmp_path):
    def hashed(size: int, left: np.ndarray) -> str:
        hashes = SampleHashes()
        for start in range(0, 11, size):
            part = slice(start, start + size)
            hashes.update((left[part].astype(np.float32), RIGHT[part].astype(np.float32)), None)
        return hashes.inputs

    assert hashed(4, LEFT) == hashed(11, LEFT)
    assert hashed(4, LEFT) != hashed(4, LEFT[::-1])
