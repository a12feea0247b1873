"""Whatever a user has, as samples in batches: folders, files of arrays, data sets, iterables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from intact.data import load_dataset, spread, to_input
from intact.data.preprocessing import PRESETS, Preprocessing
from intact.data.samples import Samples
from intact.data.sources import open_samples
from intact.errors import DataError, DataWarning

SHAPE = (3, 6, 8)
SIGNED = PRESETS["signed"]


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (11, *SHAPE), np.uint8)


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(11, *SHAPE)).astype(np.float32)


LABELS = np.arange(11) % 4


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.transpose(1, 2, 0)).save(path)


@pytest.fixture
def tree(tmp_path, pixels) -> Path:
    """Three classes with 4, 4 and 3 images, one of them deeper down."""
    root = tmp_path / "photos"
    for i, image in enumerate(pixels):
        save(root / "abc"[i // 4] / ("deep/" * (i == 7)) / f"{i:02}.png", image)
    return root


def read(samples: Samples, size: int = 4) -> tuple[np.ndarray, np.ndarray | None]:
    """All samples; what every batch must be is checked."""
    batches = list(samples.batches(size))
    assert all(len(x) == size for x, _ in batches[:-1])
    for x, labels in batches:
        assert (x.dtype, x.shape[1:]) == (np.float32, samples.shape)
        assert 1 <= len(x) <= size
        assert (labels is not None) == samples.labelled
        assert labels is None or (labels.dtype, labels.shape) == (np.int64, (len(x),))
    xs, labels = zip(*batches, strict=True)
    return np.concatenate(xs), np.concatenate(labels) if samples.labelled else None


def check(samples: Samples, x: np.ndarray, labels: np.ndarray | None) -> None:
    """These samples and no others come, at any size of batches, again and again."""
    for size in (1, 4, 100):
        got, indices = read(samples, size)
        assert np.array_equal(got, x)
        assert (indices is None) == (labels is None)
        assert labels is None or np.array_equal(indices, labels)


def refused(*args, **options) -> str:
    with pytest.raises(DataError) as error:
        read(open_samples(*args, **options))
    return str(error.value)


# -- folders of images ---------------------------------------------------------------------------


def test_a_folder_per_class_gives_labels(tree, pixels):
    samples = open_samples(tree, preprocessing=SIGNED, shape=SHAPE)
    assert (samples.name, samples.count, samples.shape) == ("images of photos", 11, SHAPE)
    assert samples.classes == ("a", "b", "c")
    check(samples, to_input(pixels), np.arange(11) // 4)


def test_a_flat_folder_has_no_labels(tmp_path, pixels):
    for i, image in enumerate(pixels):
        save(tmp_path / f"{i:02}.png", image)
    samples = open_samples(str(tmp_path), preprocessing=SIGNED, shape=SHAPE)
    assert (samples.labelled, samples.classes) == (False, None)
    check(samples, to_input(pixels), None)
    one = open_samples(tmp_path / "03.png", preprocessing=SIGNED, shape=SHAPE)
    check(one, to_input(pixels[3:4]), None)


def test_samples_are_taken_spread_over_all_classes(tree, pixels):
    samples = open_samples(tree, preprocessing=SIGNED, shape=SHAPE).take(5)
    at = spread(11, 5)
    assert samples.count == 5
    check(samples, to_input(pixels[at]), at // 4)
    assert samples.take(None) is samples
    assert samples.take(100).count == 5
    check(samples.take(2), to_input(pixels[at[[0, 4]]]), np.array([0, 2]))


@pytest.mark.parametrize("test", ["test", "val"])
def test_of_train_and_test_one_is_chosen(tmp_path, pixels, test):
    for i, image in enumerate(pixels):
        save(tmp_path / (test if i >= 8 else "train") / "ab"[i % 2] / f"{i:02}.png", image)
    trained, tested = (
        open_samples(tmp_path, preprocessing=SIGNED, shape=SHAPE, part=part)
        for part in ("train", "test")
    )
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    check(trained, to_input(pixels[order]), np.array(order) % 2)
    check(tested, to_input(pixels[[8, 10, 9]]), np.array([0, 0, 1]))
    options = {"preprocessing": SIGNED, "shape": SHAPE}
    message = refused(tmp_path, **options)
    assert f"holds train and {test}: say which of them is meant" in message
    save(tmp_path / "train" / "c" / "0.png", pixels[0])
    assert "only one of them has c" in refused(tmp_path, **options, part="test")
    save(tmp_path / {"test": "val", "val": "test"}[test] / "a" / "0.png", pixels[0])
    assert "train and test and val: say which" in refused(tmp_path, **options, part="test")


def test_a_part_that_is_not_there_is_no_other(tmp_path, pixels):
    save(tmp_path / "val" / "a" / "0.png", pixels[0])
    options = {"preprocessing": SIGNED, "shape": SHAPE}
    assert "holds val, but nothing to train with" in refused(tmp_path, **options, part="train")
    assert open_samples(tmp_path, **options, part="test").classes == ("a",)
    assert "no part 'eval'" in refused(tmp_path, **options, part="eval")


def test_a_folder_without_parts_is_taken_whole(tree):
    assert open_samples(tree, preprocessing=SIGNED, shape=SHAPE, part="test").count == 11


def test_images_are_preprocessed_as_asked(tree, pixels):
    made = Preprocessing(resize=5, crop=4, mean=(0.1, 0.2, 0.3), std=(0.5,), order="bgr")
    got, _ = read(open_samples(tree, preprocessing=made))
    assert got.shape == (11, 3, 4, 4)
    for row, image in zip(got, pixels, strict=True):
        assert np.array_equal(row, made.floats(made.pixels(image, (3, 4, 4))))


def test_images_without_preprocessing_are_refused(tree):
    message = refused(tree)
    assert "on the command line --preset, or --mean and --std" in message


def test_any_number_of_processes_gives_the_same_bits_in_the_same_order(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(70):  # more than two chunks, in batches that divide into several
        save(tmp_path / f"{i:02}.png", rng.integers(0, 256, (3, 9 + i % 5, 12), np.uint8))
    (tmp_path / "33.png").write_bytes(b"no image")
    results = []
    for workers in (0, 2):
        told: list[str] = []
        samples = open_samples(
            tmp_path,
            preprocessing=PRESETS["unit"],
            shape=SHAPE,
            workers=workers,
            skip_corrupt=True,
            on_skip=told.append,
        )
        results.append([batch for batch, _ in samples.batches(40)])
        assert [len(batch) for batch in results[-1]] == [39, 30]
        assert len(told) == 1
        with pytest.raises(DataError, match=r"33\.png cannot be read as an image"):
            list(
                open_samples(
                    tmp_path, preprocessing=PRESETS["unit"], shape=SHAPE, workers=workers
                ).batches(40)
            )
    for one, many in zip(*results, strict=True):
        assert np.array_equal(one, many)


def test_a_corrupt_image_is_named(tree):
    (tree / "b" / "05.png").write_bytes(b"no image")
    message = refused(tree, preprocessing=SIGNED, shape=SHAPE)
    assert "b/05.png cannot be read as an image" in message


def test_corrupt_images_are_left_out_and_told_once_each(tree, pixels):
    for name in ("a/02.png", "b/05.png"):
        (tree / name).write_bytes(b"no image")
    told: list[str] = []
    samples = open_samples(
        tree, preprocessing=SIGNED, shape=SHAPE, skip_corrupt=True, on_skip=told.append
    )
    kept = np.delete(np.arange(11), [2, 5])
    for _ in range(2):
        batches = list(samples.batches(4))
        assert [len(x) for x, _ in batches] == [3, 3, 3]
        assert np.array_equal(np.concatenate([x for x, _ in batches]), to_input(pixels[kept]))
        assert np.array_equal(np.concatenate([labels for _, labels in batches]), kept // 4)
    assert len(told) == 2
    assert "a/02.png cannot be read as an image" in told[0]
    assert "b/05.png cannot be read as an image" in told[1]
    samples = open_samples(tree, preprocessing=SIGNED, shape=SHAPE, skip_corrupt=True)
    with pytest.warns(DataWarning, match=r"(02|05)\.png cannot be read .* It is left out"):
        list(samples.batches(4))


def test_a_batch_of_nothing_but_corrupt_images_is_none_at_all(tree):
    (tree / "a" / "01.png").write_bytes(b"no image")
    options = {"preprocessing": SIGNED, "shape": SHAPE, "skip_corrupt": True}
    samples = open_samples(tree, **options, on_skip=lambda _: None)
    assert len(list(samples.batches(1))) == 10
    for file in tree.rglob("*.png"):
        file.write_bytes(b"no image")
    message = refused(tree, **options, on_skip=lambda _: None)
    assert message == "images of photos: none of 11 images can be read."


def test_what_is_not_there_is_said(tmp_path):
    assert "none is not there. Name a folder" in refused(tmp_path / "none", preprocessing=SIGNED)
    (tmp_path / "notes.txt").write_text("mine")
    assert "no data that can be read" in refused(tmp_path / "notes.txt", preprocessing=SIGNED)
    assert "holds no folders" in refused(tmp_path, preprocessing=SIGNED)
    assert "-1 processes cannot read" in refused(tmp_path, preprocessing=SIGNED, workers=-1)


# -- files of arrays -----------------------------------------------------------------------------


@pytest.fixture(params=["npy", "npz", "compressed", "safetensors"])
def write(request, tmp_path):
    """Writes arrays to a file of one of the kinds, and returns its path."""

    def write(**arrays: np.ndarray) -> Path:
        path = tmp_path / f"data.{'npz' if request.param == 'compressed' else request.param}"
        if request.param == "npy":
            np.save(path, *arrays.values())
        elif request.param == "safetensors":
            save_file(arrays, path)
        else:
            (np.savez if request.param == "npz" else np.savez_compressed)(path, **arrays)
        return path

    return write


def test_floats_of_a_file_are_taken_as_they_are(write, x):
    path = write(anything=x)
    for options in ({}, {"shape": SHAPE}, {"preprocessing": SIGNED}):
        samples = open_samples(path, **options)
        assert (samples.name, samples.count, samples.shape) == (path.name, 11, SHAPE)
        check(samples, x, None)
    check(samples.take(3), x[[0, 5, 10]], None)


@pytest.mark.parametrize("names", [("x", "y"), ("images", "labels"), ("inputs", "y")])
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int32])
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_labels_of_a_file_are_found_by_their_name(tmp_path, x, names, dtype, kind):
    arrays = {"another": np.zeros(3), names[0]: x, names[1]: LABELS.astype(dtype)}
    path = tmp_path / f"x.{kind}"
    np.savez(path, **arrays) if kind == "npz" else save_file(arrays, path)
    check(open_samples(path), x, LABELS)


def test_pixels_of_a_file_are_preprocessed(write, pixels):
    path = write(x=pixels)
    check(open_samples(path, preprocessing=SIGNED, shape=SHAPE), to_input(pixels), None)
    small = open_samples(path, preprocessing=SIGNED, shape=(3, 4, 4))
    got, _ = read(small)
    assert np.array_equal(got[3], SIGNED.floats(SIGNED.pixels(pixels[3], (3, 4, 4))))
    assert "holds uint8, which looks like pixels" in refused(path)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_floats_of_any_width_become_float32(tmp_path, x, dtype):
    np.save(tmp_path / "x.npy", x.astype(dtype))
    check(open_samples(tmp_path / "x.npy"), x.astype(dtype).astype(np.float32), None)


def test_a_large_file_is_not_read_into_memory(tmp_path):
    array = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (2**20, 1024))
    del array  # 4 GB, of which nothing is on the disk
    samples = open_samples(tmp_path / "x.npy").take(3)
    assert [len(x) for x, _ in samples.batches(2)] == [2, 1]


def test_a_file_that_cannot_be_used_is_refused(tmp_path, x):
    np.savez(tmp_path / "a.npz", a=x, b=x)
    assert "holds 2 arrays (a, b): give a file with one, or call" in refused(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", x=x, y=np.eye(11, 3))
    assert "labels float64 [11, 3], but labels are the indices" in refused(tmp_path / "b.npz")
    assert "If they are one-hot, take labels.argmax(1)" in refused(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", x=x, y=LABELS[:10])
    assert "labels are the indices of classes, int64 [11]" in refused(tmp_path / "c.npz")
    np.savez(tmp_path / "c.npz", x=x, y=3)
    assert "holds labels int64 [], but labels are" in refused(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", x=np.array([{}], object))
    assert "d.npz cannot be read as an array: it holds no numbers" in refused(tmp_path / "d.npz")
    np.save(tmp_path / "e.npy", x[:0])
    assert refused(tmp_path / "e.npy") == "e.npy: there are no samples."
    (tmp_path / "f.safetensors").write_bytes(b"abc")
    assert "f.safetensors cannot be read as an array" in refused(tmp_path / "f.safetensors")
    save_torch({"x": torch.zeros(2, 3, dtype=torch.bfloat16)}, tmp_path / "g.safetensors")
    assert "'x' as BF16, which NumPy lacks" in refused(tmp_path / "g.safetensors")
    np.save(tmp_path / "h.npy", np.array(["text"]))
    assert "h.npy holds str" in refused(tmp_path / "h.npy")
    assert "no such file or directory" in refused(tmp_path / "none.safetensors")


def test_a_nan_or_an_infinity_is_found(write, x):
    for value, word in ((np.nan, "a NaN"), (-np.inf, "an infinite value")):
        wrong = x.copy()
        wrong[9, 1, 2, 3] = value
        samples = open_samples(write(x=wrong))
        with pytest.raises(DataError, match=rf"holds {word} in sample 9, at \[1, 2, 3\]"):
            read(samples)
        read(samples.take(2))


def test_floats_too_large_for_float32_are_infinite(tmp_path):
    np.save(tmp_path / "x.npy", np.full((2, 3), 1e300))
    assert "holds an infinite value in sample 0" in refused(tmp_path / "x.npy")


# -- data sets by name ---------------------------------------------------------------------------


def test_a_data_set_comes_by_its_name():
    data = load_dataset("digits")
    samples = open_samples("digits", part="test")
    assert (samples.name, samples.classes) == ("digits, test images", data.classes)
    got, labels = read(samples.take(20), 7)
    at = spread(500, 20)
    assert np.array_equal(got, to_input(data.test_images[at]))
    assert np.array_equal(labels, data.test_labels[at])
    assert open_samples("digits", part="train").count == len(data.train_images)
    gray = open_samples("digits", part="test", shape=(1, 32, 32), preprocessing=PRESETS["unit"])
    got, _ = read(gray.take(3))
    assert np.array_equal(got, to_input(data.test_images[spread(500, 3), :1], (0,), (1,)))
    assert "digits has two parts: say which" in refused("digits")
    assert "only digits and cifar10 take a data folder" in refused("x.npy", data_dir="d")


# -- Python objects ------------------------------------------------------------------------------


def restarting(elements):
    """Something that can be iterated over again, and has neither length nor indices."""

    class Restarting:
        def __iter__(self):
            return iter(elements)

    return Restarting()


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("container", [list, restarting])
@pytest.mark.parametrize("cuts", [[], [4, 8], [1, 2, 9]])
@pytest.mark.parametrize("labelled", [False, True])
def test_batches_of_any_size_are_cut_anew(x, kind, container, cuts, labelled):
    xs, ys = np.split(x, cuts), np.split(LABELS, cuts)
    elements = [(kind(a), kind(b)) if labelled else kind(a) for a, b in zip(xs, ys, strict=True)]
    for shape in (None, SHAPE):
        samples = open_samples(container(elements), shape=shape)
        assert samples.count == (11 if container is list else None)
        check(samples, x, LABELS if labelled else None)
    at = spread(11, 3) if container is list else np.arange(3)
    check(samples.take(3), x[at], LABELS[at] if labelled else None)


@pytest.mark.parametrize("container", [list, restarting])
@pytest.mark.parametrize("label", [int, np.int64, torch.tensor])
def test_single_samples_are_told_from_batches(x, container, label):
    pairs = [(torch.from_numpy(a), label(int(b))) for a, b in zip(x, LABELS, strict=True)]
    for shape in (None, SHAPE):
        check(open_samples(container(pairs), shape=shape), x, LABELS)
    check(open_samples(container(list(x)), shape=SHAPE), x, None)


def test_arrays_and_tensors_hold_all_samples(x):
    for whole in (x, torch.from_numpy(x), torch.from_numpy(x).requires_grad_()):
        check(open_samples(whole), x, None)
        check(open_samples((whole, LABELS)), x, LABELS)
    check(open_samples((x[:4], x[4:])), x, None)  # two batches
    assert "holds labels float64 [11]" in refused((x, LABELS / 2))
    half = torch.from_numpy(x).to(torch.bfloat16)
    check(open_samples(half), half.float().numpy(), None)


def test_data_sets_and_loaders_of_torch(x):
    data = TensorDataset(torch.from_numpy(x), torch.from_numpy(LABELS))
    samples = open_samples(data)
    assert samples.count == 11
    check(samples.take(4), x[spread(11, 4)], LABELS[spread(11, 4)])
    loader = DataLoader(data, batch_size=3)
    samples = open_samples(loader)
    assert samples.name == "the given DataLoader"
    check(samples, x, LABELS)
    with pytest.warns(DataWarning, match="the DataLoader shuffles.*shuffle=False"):
        open_samples(DataLoader(data, batch_size=3, shuffle=True))


def test_a_data_set_that_can_only_be_iterated_over(x):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(torch.from_numpy(x))

        def __len__(self):
            return len(x)

    samples = open_samples(Stream(), shape=SHAPE)
    assert samples.count is None
    check(samples, x, None)


def test_a_data_set_of_batches(x):
    class Batches:
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return x[4 * i : 4 * i + 4]

    check(open_samples(Batches()), x, None)


def test_pixels_of_tensors_are_preprocessed(pixels):
    for elements in (list(torch.from_numpy(pixels)), [pixels[:5], pixels[5:]]):
        for container in (list, restarting):
            samples = open_samples(container(elements), preprocessing=SIGNED, shape=SHAPE)
            check(samples, to_input(pixels), None)
    assert "looks like pixels" in refused([pixels])


def test_a_generator_can_be_read_once(x):
    samples = open_samples(batch for batch in np.split(x, [4, 7]))
    got, _ = read(samples.take(9))
    assert np.array_equal(got, x[:9])
    with pytest.raises(DataError, match=r"the given generator can be read only once.*Give a list"):
        next(samples.batches(1))


def test_elements_that_cannot_be_used_are_numbered(x):
    for elements, options, message in (
        ([], {}, "the given list: there are no samples."),
        (iter([]), {}, "there are no samples."),
        ([x, x[:0]], {}, "element 1 of the given list holds no samples"),
        ([x, "text"], {}, "element 1 of the given list is a str: give tensors"),
        ([(x, LABELS, 3)], {}, "element 0 of the given list is a tuple of 3"),
        ([(x, LABELS), x], {}, "element 1 of the given list has no label, unlike the first"),
        ([x, (x, LABELS)], {}, "element 1 of the given list has a label, unlike the first"),
        ([(x, LABELS[:3])], {}, "labels int64 [3], but labels are the indices of classes"),
        ([(x, LABELS / 2)], {}, "labels float64 [11], but labels are the indices"),
        ([x, x[:, :, :5]], {}, "element 1 of the given list holds samples of shape [3, 5, 8]"),
        ([x], {"shape": (3, 8, 8)}, "shape [3, 6, 8], but the network takes [3, 8, 8]. Resize"),
        ([x.transpose(0, 2, 3, 1)], {"shape": SHAPE}, "move the channels with np.moveaxis"),
        (
            [x.astype(np.int32)],
            {},
            "element 0 of the given list holds int32, but the network takes floats",
        ),
        ({"x": x}, {}, "samples cannot be read from a dict"),
        (3, {}, "samples cannot be read from a int: give a folder"),
    ):
        assert message in refused(elements, **options), message
    wrong = x.copy()
    wrong[6, 0, 0, 0] = np.nan
    assert "a NaN in sample 6" in refused([wrong[:4], wrong[4:]])
    assert "a NaN in sample 6" in refused(restarting([wrong[:4], wrong[4:]]))


def test_batches_and_samples_of_nothing_are_refused(x):
    samples = open_samples(x)
    with pytest.raises(DataError, match="a batch cannot hold 0 samples"):
        samples.batches(0)
    with pytest.raises(DataError, match="0 samples are none to work with"):
        samples.take(0)


def test_reading_files_needs_no_torch(tmp_path, x):
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys; from intact.data.sources import open_samples; "
        f"next(open_samples({str(tmp_path / 'x.npy')!r}).batches(3)); print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


# -- files that cannot be read --------------------------------------------------------------------


def test_a_file_that_is_no_array_or_a_pickle_is_refused(tmp_path):
    for content in (b"", b"\x93NUMPY", b"PK\x03\x04", b"[1, 2]"):
        (tmp_path / "x.npy").write_bytes(content)
        assert "cannot be read as an array" in refused(tmp_path / "x.npy")
    np.save(tmp_path / "o.npy", np.array([{}], object), allow_pickle=True)
    for file in ("x.npy", "o.npy"):  # NumPy itself would recommend to load what may run code
        message = refused(tmp_path / file)
        assert "cannot be read as an array: it holds no numbers." in message
        assert "pickle" not in message
    assert "as an array: no such file or directory." in refused(tmp_path / "none.npy")


def test_a_damaged_array_is_refused(tmp_path):
    file = tmp_path / "x.npy"
    np.save(file, np.zeros((2, 3, 6, 8), np.float32))
    whole = file.read_bytes()
    shape = b"(2, 3, 6, 8), "
    for damaged in (whole[:-1], whole.replace(shape, b"(%d,)" % 10**10 + b" ")):
        assert damaged != whole
        file.write_bytes(damaged)
        assert "cannot be read as an array" in refused(file)
    packed = tmp_path / "x.npz"
    np.savez_compressed(packed, np.random.default_rng(0).normal(size=(50, 3, 6, 8)))
    content = bytearray(packed.read_bytes())
    content[2000:2400] = bytes(400)
    packed.write_bytes(content)
    assert "cannot be read as an array" in refused(packed)


def test_an_archive_must_hold_one_array(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros(1), b=np.zeros(1))
    assert "holds 2 arrays (a, b): give a file with one" in refused(tmp_path / "x.npz")
