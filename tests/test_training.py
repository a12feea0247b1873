"""Training: what a step computes, the same bits from a seed, and going on where it stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from intact.data import Dataset, load_dataset
from intact.errors import DataError, IntactError, StorageError
from intact.training import (
    SCHEDULES,
    Schedule,
    augment,
    learning_rate,
    predict,
    schedule_for,
    train,
    train_lenet,
)
from intact.zoo import LeNet, read_lenet

PLAIN = Schedule(epochs=3, batch_size=8, learning_rate=0.01)
EVERYTHING = Schedule(
    epochs=4,
    batch_size=8,
    learning_rate=0.05,
    nesterov=True,
    weight_decay=0.01,
    warmup=0.25,
    anneal=True,
    average=0.9,
    crop=1,
    flip=True,
    cutout=2,
    smoothing=0.1,
)


def noise(classes: int = 4, seed: int = 0) -> Dataset:
    """30 small images, so that the last batch of 8 is not full."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (30, 3, 6, 6), dtype=np.uint8)
    labels = rng.integers(0, classes, 30)
    names = tuple(map(str, range(classes)))
    return Dataset("noise", names, images[:20], labels[:20], images[20:], labels[20:])


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 4))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- what a training computes --------------------------------------------------------------------


def test_plain_training_is_torchs_own_sgd_over_a_new_permutation_each_epoch():
    """The classical loop, written out, on the same order of images."""
    data, got, expected = noise(), network(), network()
    train(got, data, PLAIN, seed=5)
    pixels = torch.from_numpy(data.train_images.copy()).float().div(255).sub(0.5).div(0.5)
    labels = torch.from_numpy(data.train_labels.copy())
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.01, momentum=0.9)
    for epoch in range(3):
        order = torch.from_numpy(np.random.default_rng((5, epoch)).permutation(20))
        for chosen in order.split(8):
            optimizer.zero_grad()
            F.cross_entropy(expected(pixels[chosen]), labels[chosen]).backward()
            optimizer.step()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(got.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    assert not equal(weights(got), weights(network()))


def test_training_finds_what_there_is_to_learn():
    """Bright images are of class 1, dark ones of class 0."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    images = (rng.integers(0, 100, (60, 3, 6, 6)) + 120 * labels[:, None, None, None]).astype("u1")
    data = Dataset("light", ("0", "1"), images[:40], labels[:40], images[40:], labels[40:])
    model = network()
    train(model, data, replace(EVERYTHING, epochs=10), seed=0)
    assert np.array_equal(predict(model, data.test_images), data.test_labels)
    assert not model.training


def test_the_result_is_the_moving_average_of_the_weights():
    """Along a run whose weights are known: each step of epoch by epoch training is recorded."""
    data, schedule = noise(), replace(EVERYTHING, epochs=2)
    model, path = network(), []
    path.append(weights(model))
    train(model, data, schedule, seed=1, progress=lambda *_: path.append(weights(model)))
    average = path[0]
    for number, step in enumerate(path[1:]):
        decay = min(0.9, (1 + number) / (10 + number))
        average = {n: decay * average[n] + (1 - decay) * step[n] for n in average}
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, average[name], rtol=1e-5, atol=1e-6)
    assert not equal(weights(model), path[-1])


def test_the_test_set_has_no_influence():
    data = noise()
    other = replace(data, test_images=255 - data.test_images, test_labels=3 - data.test_labels)
    a, b = network(), network()
    train(a, data, EVERYTHING, seed=0)
    train(b, other, EVERYTHING, seed=0)
    assert equal(weights(a), weights(b))


def test_the_learning_rate_rises_linearly_and_falls_along_half_a_cosine():
    schedule = replace(EVERYTHING, learning_rate=2.0, warmup=0.1)
    rates = [learning_rate(schedule, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)  # the middle of the fall
    assert rates == [*sorted(rates[:11]), *sorted(rates[11:], reverse=True)]
    assert 0 < rates[-1] < 0.01


def test_without_annealing_the_learning_rate_stays():
    assert {learning_rate(PLAIN, step, 60) for step in range(60)} == {0.01}


def test_progress_is_told_after_every_step():
    seen = []
    model = network()
    train(model, noise(), PLAIN, seed=0, progress=lambda *args: seen.append(args))
    assert [(epoch, step, total) for epoch, step, total, *_ in seen] == [
        (epoch, step, 3) for epoch in (1, 2, 3) for step in (1, 2, 3)
    ]
    assert all(loss > 0 and 0 <= accuracy <= 1 for *_, loss, accuracy in seen)
    # The accuracy of an epoch is a count of its 20 images.
    assert all((accuracy * 20) % 1 == pytest.approx(0) for *_, accuracy in seen[2::3])


def test_a_training_that_diverges_says_so():
    with pytest.raises(IntactError, match=r"diverged in epoch 1: its loss is .* another seed"):
        train(network(), noise(), replace(PLAIN, batch_size=2, learning_rate=1e10), seed=0)


def normalised(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(80, 4))


def test_statistics_of_batch_norm_are_not_combined_with_averaged_weights():
    with pytest.raises(IntactError, match=r"\['1.running_mean.*Train it with average=0"):
        train(normalised(), noise(), EVERYTHING, seed=0)


def test_the_statistics_of_batch_norm_survive_an_interruption(tmp_path):
    schedule = replace(EVERYTHING, average=0.0)
    expected, parts, again = normalised(), normalised(), normalised()
    train(expected, noise(), schedule, seed=2)

    def stop(*at: float) -> None:
        if at[:2] == (3, 1):
            raise KeyboardInterrupt

    path = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        train(parts, noise(), schedule, 2, checkpoint=path, progress=stop)
    train(again, noise(), schedule, 2, checkpoint=path, resume=True)
    assert equal(weights(again), weights(expected))
    assert weights(again)["1.num_batches_tracked"] == 4 * 3


# -- augmentation --------------------------------------------------------------------------------


class Watched(nn.Module):
    """A network for images of any size, with a strided depthwise convolution, that notes sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, (3, 5), (2, 3), padding=(1, 2), groups=3)
        self.fc = nn.Linear(6, 4)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        self.seen.append((*x.shape[2:], *y.shape[2:]))
        return self.fc(y.mean((2, 3)))


def test_images_take_each_size_for_an_equal_part_of_all_steps():
    model = Watched()
    train(model, noise(), replace(PLAIN, epochs=2, sizes=(4, 5, 6)), seed=0)
    assert [side for side, *_ in model.seen] == [4, 4, 5, 5, 6, 6]


def test_a_training_with_sizes_goes_on_where_it_stopped(tmp_path):
    schedule, path = replace(EVERYTHING, sizes=(4, 6)), tmp_path / "c"

    def stop(epoch: int, *_: object) -> None:
        if epoch == 3:
            raise KeyboardInterrupt

    straight, parts = Watched(), Watched()
    train(straight, noise(), schedule, 1)
    with pytest.raises(KeyboardInterrupt):
        train(parts, noise(), schedule, 1, checkpoint=path, progress=stop)
    assert parts.conv.stride == (2, 3)
    again = Watched()
    train(again, noise(), schedule, 1, checkpoint=path, resume=True)
    assert equal(weights(again), weights(straight))


def test_a_strided_depthwise_convolution_is_trained_as_what_it_is():
    """Its outputs keep their number and, but for rounding, their values and gradients."""
    model, plain = Watched(), Watched()
    train(model, noise(), replace(PLAIN, epochs=1), seed=0)
    assert model.seen[0] == (6, 6, 3, 2)
    assert model.conv.stride == (2, 3)
    assert not model.conv._forward_hooks
    data = noise()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
    order = np.random.default_rng((0, 0)).permutation(20)
    for start in range(0, 20, 8):
        chosen = order[start : start + 8]
        x = torch.from_numpy(data.train_images[chosen]).float().div(255).sub(0.5).div(0.5)
        optimizer.zero_grad()
        F.cross_entropy(plain(x), torch.from_numpy(data.train_labels[chosen])).backward()
        optimizer.step()
    for name, tensor in weights(model).items():
        torch.testing.assert_close(tensor, weights(plain)[name])
    assert not equal(weights(model), weights(Watched()))


def test_augmentation_shifts_into_black_and_mirrors():
    """Every image that comes out is one of the 18 that can, and each of these comes out."""
    image = np.arange(1, 28, dtype=np.uint8).reshape(3, 3, 3)
    padded = np.zeros((3, 5, 5), np.uint8)
    padded[:, 1:4, 1:4] = image
    crops = [padded[:, y : y + 3, x : x + 3] for y in range(3) for x in range(3)]
    possible = {crop.tobytes() for crop in crops} | {crop[..., ::-1].tobytes() for crop in crops}
    assert len(possible) == 18
    schedule = replace(PLAIN, crop=1, flip=True)
    got = augment(np.repeat(image[None], 500, 0), schedule, np.random.default_rng(0))
    assert {one.tobytes() for one in got} == possible


def test_without_augmentation_images_stay():
    images = noise().train_images
    assert np.array_equal(augment(images, PLAIN, np.random.default_rng(0)), images)


def test_cutout_leaves_mid_grey_of_a_square_at_any_place():
    """Squares of 3 around each of the 5 x 4 pixels, which end at the border."""
    image = np.arange(60, dtype=np.uint8).reshape(3, 5, 4)
    possible = set()
    for y in range(5):
        for x in range(4):
            one = image.copy()
            one[:, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] = 128
            possible.add(one.tobytes())
    assert len(possible) == 20
    images = np.repeat(image[None], 500, 0)
    got = augment(images, replace(PLAIN, cutout=3), np.random.default_rng(0))
    assert {one.tobytes() for one in got} == possible
    assert np.array_equal(images[0], image)


def test_smoothing_spreads_a_share_of_the_target_over_all_classes():
    """Its loss is the cross-entropy to 0.2 / 4 of each class and 0.8 of the right one."""
    seen, model, data = [], network(), noise()
    whole = replace(PLAIN, epochs=1, batch_size=20, smoothing=0.2)
    logits = model(torch.from_numpy(data.train_images.copy()).float().div(255).sub(0.5).div(0.5))
    target = 0.8 * F.one_hot(torch.from_numpy(data.train_labels.copy()), 4) + 0.2 / 4
    expected = -(target * logits.log_softmax(1)).sum(1).mean().item()
    train(model, data, whole, 0, progress=lambda *at: seen.append(at[3]))
    assert seen == [pytest.approx(expected, rel=1e-5)]


def test_digits_are_never_mirrored():
    assert not schedule_for("best", "digits").flip
    assert schedule_for("best", "cifar10").flip


def test_the_two_epoch_schedule_is_the_experiments():
    for data in ("digits", "cifar10", "folder"):
        got = schedule_for("two-epoch", data)
        assert got == Schedule(epochs=2, batch_size=4, learning_rate=0.001, momentum=0.9)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(IntactError, match=r"no schedule 'fast'\. There are: two-epoch, best"):
        schedule_for("fast", "digits")
    assert SCHEDULES == ("two-epoch", "best")


# -- the same bits -------------------------------------------------------------------------------


def trained(seed: int, **options: object) -> dict[str, torch.Tensor]:
    model = network()
    train(model, noise(), EVERYTHING, seed, **options)  # type: ignore[arg-type]
    return weights(model)


def test_a_seed_gives_the_same_weights_each_time_and_another_seed_others():
    assert equal(trained(3), trained(3))
    assert not equal(trained(3), trained(4))


def test_the_number_of_threads_and_the_global_generators_do_not_matter():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.manual_seed(99)
        got = trained(3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert equal(got, trained(3))


@pytest.mark.parametrize(("epoch", "step"), [(1, 2), (2, 1), (2, 3), (3, 2), (4, 3)], ids=str)
@pytest.mark.parametrize("schedule", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, schedule, epoch, step):
    checkpoint = tmp_path / "run.checkpoint"
    schedule = replace(schedule, epochs=4)
    expected = network()
    train(expected, noise(), schedule, seed=2)

    def stop(*at: float) -> None:
        if at[:2] == (epoch, step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(network(), noise(), schedule, 2, checkpoint=checkpoint, progress=stop)
    assert checkpoint.exists() == (epoch > 1)
    again, seen = network(), []
    train(
        again,
        noise(),
        schedule,
        2,
        checkpoint=checkpoint,
        resume=True,
        progress=lambda *at: seen.append(at),
    )
    assert seen[0][:2] == (epoch, 1)  # the epochs that were finished are not run again
    assert equal(weights(again), weights(expected))
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_schedules_follow_each_other(tmp_path):
    """Each starts as a training of its own, with the weights of the one before, and anneals."""
    plain = replace(PLAIN, epochs=2, anneal=True)
    straight, parts, seen = network(), network(), []
    train(straight, noise(), [EVERYTHING, plain], 2, progress=lambda *at: seen.append(at[:3]))
    train(parts, noise(), EVERYTHING, 2)
    first = weights(parts)
    optimizer = torch.optim.SGD(parts.parameters(), lr=0.01, momentum=0.9)
    pixels = torch.from_numpy(noise().train_images.copy()).float().div(255).sub(0.5).div(0.5)
    labels = torch.from_numpy(noise().train_labels.copy())
    for epoch in range(2):
        order = torch.from_numpy(np.random.default_rng((2, 4 + epoch)).permutation(20))
        for step, chosen in enumerate(order.split(8)):
            optimizer.param_groups[0]["lr"] = learning_rate(plain, epoch * 3 + step, 6)
            optimizer.zero_grad()
            F.cross_entropy(parts(pixels[chosen]), labels[chosen]).backward()
            optimizer.step()
    for name, tensor in weights(straight).items():
        torch.testing.assert_close(tensor, parts.state_dict()[name], rtol=1e-5, atol=1e-6)
    assert not equal(weights(straight), first)
    assert seen == [(epoch, step, 3) for epoch in range(1, 7) for step in (1, 2, 3)]


@pytest.mark.parametrize("epoch", range(2, 8), ids=str)
def test_several_schedules_go_on_where_they_stopped(tmp_path, epoch):
    """Within one, and where one ends: epoch 5 is the first of the second, epoch 7 of the third."""
    schedules = [EVERYTHING, replace(PLAIN, epochs=2), replace(EVERYTHING, epochs=1, cutout=0)]
    expected, again, path = network(), network(), tmp_path / "c"
    train(expected, noise(), schedules, 2)

    def stop(*at: float) -> None:
        if at[:2] == (epoch, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(network(), noise(), schedules, 2, checkpoint=path, progress=stop)
    train(again, noise(), schedules, 2, checkpoint=path, resume=True)
    assert equal(weights(again), weights(expected))
    with pytest.raises(StorageError, match="differs in schedules"):
        train(again, noise(), schedules[:2], 2, checkpoint=path, resume=True)


def test_a_finished_run_resumes_to_its_result(tmp_path):
    expected = trained(2, checkpoint=tmp_path / "c")
    seen = []
    got = trained(2, checkpoint=tmp_path / "c", resume=True, progress=lambda *at: seen.append(at))
    assert equal(got, expected)
    assert seen == []


def test_without_resuming_a_checkpoint_is_not_looked_at(tmp_path):
    (tmp_path / "c").write_bytes(b"not a checkpoint")
    assert equal(trained(2, checkpoint=tmp_path / "c"), trained(2))


def test_a_changed_checkpoint_changes_the_result(tmp_path):
    """So the comparisons above can fail, and the checkpoint is what they depend on."""
    trained(2, checkpoint=tmp_path / "c")
    data = bytearray((tmp_path / "c").read_bytes())
    data[-1] ^= 0x40
    (tmp_path / "c").write_bytes(data)
    changed = trained(2, checkpoint=tmp_path / "c", resume=True)
    data[-1] ^= 0x40
    header = 8 + int.from_bytes(data[:8], "little")
    data[header] ^= 0x40
    (tmp_path / "c").write_bytes(data)
    also = trained(2, checkpoint=tmp_path / "c", resume=True)
    assert not (equal(changed, trained(2)) and equal(also, trained(2)))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"seed": 3}, "seed"),
        ({"schedules": replace(EVERYTHING, learning_rate=0.06)}, "schedules"),
        ({"dataset": noise(seed=1)}, "dataset"),
        ({"model": network(1)}, "initial_weights"),
        ({"seed": 3, "dataset": noise(seed=1)}, "seed, dataset"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(tmp_path, other, named):
    checkpoint = tmp_path / "c"
    trained(2, checkpoint=checkpoint)
    settings = {"model": network(), "dataset": noise(), "schedules": EVERYTHING, "seed": 2} | other
    with pytest.raises(StorageError, match=f"another training: it differs in {named}. Give"):
        train(**settings, checkpoint=checkpoint, resume=True)


@pytest.mark.parametrize("content", [b"", b"\x80\x04 a pickle", b"{}" * 40])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(StorageError, match="is not a checkpoint that can be read"):
        trained(2, checkpoint=tmp_path / "c", resume=True)


def test_a_truncated_checkpoint_is_refused(tmp_path):
    trained(2, checkpoint=tmp_path / "c")
    (tmp_path / "c").write_bytes((tmp_path / "c").read_bytes()[:-1])
    with pytest.raises(StorageError, match="is not a checkpoint that can be read"):
        trained(2, checkpoint=tmp_path / "c", resume=True)


def test_a_checkpoint_without_its_tensors_is_refused(tmp_path):
    trained(2, checkpoint=tmp_path / "c")
    with safe_open(tmp_path / "c", framework="pt") as file:
        metadata = file.metadata()
    from safetensors.torch import save_file

    save_file({"weight:0.weight": torch.zeros(1)}, tmp_path / "c", metadata)
    with pytest.raises(StorageError, match="does not hold the state of this training"):
        trained(2, checkpoint=tmp_path / "c", resume=True)


# -- LeNet ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few_digits() -> Dataset:
    data = load_dataset("digits")
    return replace(
        data,
        train_images=data.train_images[:120],
        train_labels=data.train_labels[:120],
        test_images=data.test_images[:50],
        test_labels=data.test_labels[:50],
    )


def lenet(data: Dataset, out: Path, **options: object):
    return train_lenet(data, "last", "two-epoch", 7, out, command="intact train …", **options)


def test_the_file_holds_the_weights_and_how_they_came_about(few_digits, tmp_path):
    out = tmp_path / "lenet.safetensors"
    result = lenet(few_digits, out)
    assert list(tmp_path.iterdir()) == [out]  # the checkpoint is gone
    model = read_lenet(out, "last")
    correct = (predict(model, few_digits.test_images) == few_digits.test_labels).sum()
    assert (result.path, result.correct, result.total) == (out, correct, 50)
    assert result.accuracy == correct / 50
    with safe_open(out, framework="pt") as file:
        about = json.loads(file.metadata()["training"])
    assert about["command"] == "intact train …"
    assert about["seed"] == 7
    assert about["schedule"]["name"] == "two-epoch"
    assert about["schedule"]["learning_rate"] == 0.001
    assert about["data"] == {"name": "digits", "sha256": few_digits.sha256}
    assert about["test"] == {"correct": correct, "total": 50, "accuracy": correct / 50}
    assert about["versions"]["torch"] == torch.__version__
    assert about["threads"] == 1


def test_the_same_command_writes_the_same_file_whatever_the_global_generator(few_digits, tmp_path):
    for i, name in enumerate(("a", "b")):
        torch.manual_seed(i)
        before = torch.get_rng_state()
        lenet(few_digits, tmp_path / name)
        assert torch.equal(torch.get_rng_state(), before)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_interrupted_lenet_leaves_a_checkpoint_and_resumes_to_the_same_file(
    few_digits, tmp_path
):
    lenet(few_digits, tmp_path / "whole")

    def stop(*at: float) -> None:
        if at[:2] == (2, 5):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lenet(few_digits, tmp_path / "parts", progress=stop)
    assert {p.name for p in tmp_path.iterdir()} == {"whole", "parts.checkpoint"}
    lenet(few_digits, tmp_path / "parts", resume=True)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"whole", "parts"}


def test_the_seed_decides_the_initial_weights(few_digits, tmp_path):
    train_lenet(few_digits, "all", "two-epoch", 7, tmp_path / "a", command="")
    train_lenet(few_digits, "all", "two-epoch", 8, tmp_path / "b", command="")
    a, b = (read_lenet(tmp_path / n, "all").state_dict() for n in "ab")
    assert not any(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("shape", "classes"), [((5, 3, 28, 28), 10), ((5, 3, 32, 32), 11)], ids=["size", "classes"]
)
def test_images_that_lenet_cannot_take_are_refused(tmp_path, shape, classes):
    names = tuple(map(str, range(classes)))
    images, labels = np.zeros(shape, np.uint8), np.zeros(5, np.int64)
    data = Dataset("mine", names, images, labels, images, labels)
    with pytest.raises(
        DataError, match=rf"\[3, 32, 32\] images of at most 10 classes, not .*{classes}"
    ):
        lenet(data, tmp_path / "w")


def test_a_file_that_cannot_be_written_is_named(few_digits, tmp_path):
    with pytest.raises(StorageError, match="nowhere"):
        lenet(few_digits, tmp_path / "nowhere" / "w")


def test_predict_gives_the_class_with_the_largest_logit(few_digits):
    torch.manual_seed(0)
    model = LeNet("all")
    x = few_digits.test_images[:10].astype(np.float32) / 255
    logits = model((torch.from_numpy(x) - 0.5) / 0.5)
    assert predict(model, few_digits.test_images[:10]).tolist() == logits.argmax(1).tolist()


def test_a_checkpoint_is_never_overwritten_by_a_new_training(tmp_path):
    out = tmp_path / "weights.safetensors"
    checkpoint = tmp_path / "weights.safetensors.checkpoint"
    checkpoint.write_bytes(b"hours of work")
    with pytest.raises(StorageError, match="Go on from it with --resume, or delete it"):
        train_lenet(load_dataset("digits"), "last", "best", 0, out, command="test")
    assert checkpoint.read_bytes() == b"hours of work"
