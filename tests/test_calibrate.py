"""Calibration sees every tensor, keeps sketches alone, and does not depend on order or shards."""

from __future__ import annotations

import functools
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from intact.calibrate import SAMPLE_MAX, calibrate
from intact.errors import CalibrationError
from intact.network import Network, TensorSpec
from intact.ops import Conv2d, Linear, MaxPool2d, Reshape
from intact.sketch import Sketch


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_network() -> Network:
    """Two convolutions with ReLU, a pool, and a linear layer; weights from a seed."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / 4

    return Network(
        inputs=("image",),
        outputs=("fc",),
        ops=(
            Conv2d("conv1", ("image",)),
            MaxPool2d("pool", ("conv1",)),
            Conv2d("conv2", ("pool",), padding=(1, 1, 1, 1)),
            Reshape("flatten", ("conv2",), shape=(64,)),
            Linear("fc", ("flatten",)),
        ),
        tensors={
            "image": TensorSpec((3, 10, 10)),
            "conv1": TensorSpec((5, 8, 8), low=0),
            "pool": TensorSpec((5, 4, 4)),
            "conv2": TensorSpec((4, 4, 4), low=0, high=1),
            "flatten": TensorSpec((64,)),
            "fc": TensorSpec((6,)),
        },
        parameters={
            "conv1.weight": weight(5, 3, 3, 3),
            "conv2.weight": weight(4, 5, 3, 3),
            "conv2.bias": weight(4),
            "fc.weight": weight(6, 64),
        },
    )


def images(count: int = 7, size: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand((size, 3, 10, 10), generator=generator) * 2 - 1 for _ in range(count)]


def test_every_tensor_is_sketched_as_the_network_computes_it():
    network, batches = small_network(), images()
    got = calibrate(network, batches)
    seen: dict[str, list[np.ndarray]] = {}

    def keep(name: str, tensor: torch.Tensor) -> torch.Tensor:
        seen.setdefault(name, []).append(tensor.numpy().copy())
        return tensor

    for batch in batches:
        network(batch, keep)
    assert list(got) == ["image", "conv1", "pool", "conv2", "flatten", "fc"]
    assert got == {name: Sketch.of(np.concatenate(tensors)) for name, tensors in seen.items()}
    assert (got["conv1"].min, got["conv2"].max) == (0, 1)  # the fused clamps


def test_the_order_of_the_batches_does_not_matter():
    network, batches = small_network(), images()
    expected = calibrate(network, batches)
    for seed in range(3):
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed))
        assert calibrate(network, [batches[i] for i in order]) == expected
    changed = [*batches[:-1], batches[-1] + 2.0**-20]
    assert calibrate(network, changed) != expected


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_the_sketches_of_shards_merge_to_those_of_the_whole(shards):
    network, batches = small_network(), images()
    parts = [calibrate(network, batches[i::shards]) for i in range(shards)]
    merged = {n: functools.reduce(Sketch.merge, (p[n] for p in parts)) for n in parts[0]}
    assert merged == calibrate(network, batches)


def test_large_tensors_are_sampled_at_the_same_positions_in_any_batch():
    side = 120  # 43,200 values to an image
    network = Network(
        inputs=("image",),
        outputs=("conv",),
        ops=(Conv2d("conv", ("image",), stride=(8, 8)),),
        tensors={"image": TensorSpec((3, side, side)), "conv": TensorSpec((1, 15, 15))},
        parameters={"conv.weight": torch.ones(1, 3, 1, 1)},
    )
    x = torch.randn(5, 3, side, side, generator=torch.Generator().manual_seed(0))
    got = calibrate(network, [x])
    assert got == calibrate(network, [x[3:], x[:3]])
    assert got["conv"].count == 5 * 225
    assert 5 * SAMPLE_MAX / 2 < got["image"].count <= 5 * SAMPLE_MAX
    assert (got["image"].min, got["image"].max) == (x.min(), x.max())
    assert got["image"].std == pytest.approx(1, abs=0.01)


def test_batches_may_be_pairs_or_arrays_of_any_float():
    network, batches = small_network(), images()
    expected = calibrate(network, batches)
    labels = torch.zeros(3)
    assert calibrate(network, [(b, labels) for b in batches]) == expected
    assert calibrate(network, [[b, labels] for b in batches]) == expected  # a DataLoader's
    assert calibrate(network, (b.numpy() for b in batches)) == expected
    assert calibrate(network, [b.double() for b in batches]) == expected


def test_memory_does_not_grow_with_the_number_of_batches():
    alive: list[weakref.ref[torch.Tensor]] = []

    def batches():
        for batch in images(20):
            own = batch.clone()
            alive.append(weakref.ref(own))
            yield own
            del own
            # At most the batch that has just been seen, which the caller's loop still names.
            assert sum(ref() is not None for ref in alive) <= 1

    calibrate(small_network(), batches())
    assert len(alive) == 20


def test_a_large_batch_needs_no_more_memory_than_a_small_one(monkeypatch):
    """Its images run a few at a time: four whose largest tensor, conv1, has 320 floats each."""
    run, together = Network.__call__, []

    def counted(network: Network, x: torch.Tensor, hook: object) -> object:
        together.append(len(x))
        return run(network, x, hook)

    expected = calibrate(small_network(), images(1, 9))
    monkeypatch.setattr(Network, "__call__", counted)
    monkeypatch.setattr("intact.calibrate.PART", 4 * 4 * 320 + 15)
    got = calibrate(small_network(), images(1, 9))
    assert together == [4, 4, 1]
    assert {n: s.count for n, s in got.items()} == {n: s.count for n, s in expected.items()}


def test_progress_tells_the_number_of_images_so_far():
    seen: list[int] = []
    calibrate(small_network(), images(3), seen.append)
    assert seen == [3, 6, 9]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(0, 3, 10, 10), "batch 1: it holds no images"),
        (torch.zeros(2, 1, 10, 10), r"batch 1: its shape is \[2, 1, 10, 10\].* \[N, 3, 10, 10\]"),
        (torch.zeros(3, 10, 10), "Put it in a list: that is one image"),
        (torch.zeros(2, 3, 10, 10, dtype=torch.uint8), "the images are torch.uint8"),
        ("a path", "a tensor or an array, or a pair of one and labels, not a str"),
        ((), "not a tuple"),
        (torch.full((2, 3, 10, 10), torch.nan), "batch 1: tensor 'image' holds 600 NaN"),
        (torch.full((2, 3, 10, 10), 3e38), "batch 1: tensor 'conv1' holds"),
    ],
)
def test_a_bad_batch_is_refused_by_its_number(batch, message):
    with pytest.raises(CalibrationError, match=message):
        calibrate(small_network(), [images()[0], batch])


def test_no_batches_are_refused():
    used_up = iter(images())
    list(used_up)
    with pytest.raises(CalibrationError, match="no calibration batches"):
        calibrate(small_network(), used_up)


# -- several processes -----------------------------------------------------------------------------

PROCESSES = 2


def _worker(rank: int, folder: str) -> None:
    """One process: its own share, no share at all, and a share that fails on one of them."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES
    )
    network, batches = small_network(), images()
    results = {
        "shared": calibrate(network, batches[rank::PROCESSES]),
        "one": calibrate(network, batches if rank == 1 else []),
    }
    for case, sketches in results.items():
        for name, sketch in sketches.items():
            np.savez(f"{folder}/{case}-{rank}-{name}.npz", **vars(sketch))
    bad = [torch.full((1, 3, 10, 10), torch.nan)] if rank == 1 else batches[:1]
    for case, data in {"bad": bad, "none": []}.items():
        try:
            calibrate(network, data)
        except CalibrationError as error:
            Path(folder, f"{case}-{rank}.txt").write_text(str(error), encoding="utf-8")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_processes_that_share_the_data_return_what_one_process_returns(tmp_path):
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=PROCESSES)
    expected = calibrate(small_network(), images())
    fields = ("counts", "low_sums", "low_squares", "channel_min", "channel_max")
    for case in ("shared", "one"):
        for rank in range(PROCESSES):
            for name, sketch in expected.items():
                with np.load(tmp_path / f"{case}-{rank}-{name}.npz") as stored:
                    got = Sketch(*(stored[field] for field in fields))
                assert got == sketch, (case, rank, name)
                assert not np.signbit(got.channel_min[got.channel_min == 0]).any()
    errors = [(tmp_path / f"bad-{rank}.txt").read_text() for rank in range(PROCESSES)]
    assert "failed in 1 other process(es)" in errors[0]
    assert "batch 0: tensor 'image' holds 300 NaN" in errors[1]
    for rank in range(PROCESSES):
        assert "no calibration batches" in (tmp_path / f"none-{rank}.txt").read_text()
