"""Training a classifier from a seed: resumable, and to the same bits each time.

Every batch follows from the seed and the number of its epoch, and the number of threads is fixed,
and so with it the order of the sums in a gradient. On one machine and torch version, the same
arguments give the same weights, whether a run was interrupted or not. Another processor may round
differently.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import nn

from intact.data import Dataset, Images, batches, to_input
from intact.errors import DataError, IntactError, StorageError
from intact.storage import write_atomically
from intact.zoo.lenet import CLASSES, INPUT_SHAPE, Bias, LeNet
from intact.zoo.networks import NETWORKS

__all__ = [
    "SCHEDULES",
    "Progress",
    "Schedule",
    "Trained",
    "network_schedules",
    "schedule_for",
    "train",
    "train_lenet",
    "train_network",
]


@dataclass(frozen=True, slots=True)
class Schedule:
    """How to train: stochastic gradient descent on the cross-entropy of shuffled batches.

    epochs           passes over the training set
    batch_size       images in a batch; the last one of an epoch holds what is left
    learning_rate    of each step; the highest one if it is annealed
    momentum         of the gradient descent
    nesterov         whether the momentum looks ahead
    weight_decay     L2 penalty on every parameter
    warmup           fraction of all steps in which the learning rate rises linearly from 0
    anneal           whether it then falls to 0 along half a cosine; else it stays
    average          decay per step of the moving average of the weights that becomes the result;
                     0 takes the weights of the last step
    crop             black pixels added around an image before a crop of its own size is taken
    flip             whether half of the images are mirrored
    cutout           side of the square of mid-grey at a random place of each image, in pixels; it
                     may stand out at the border
    smoothing        share of the target that is spread evenly over all classes
    channels_last    whether channels are innermost in memory: faster, and rounded differently
    bfloat16         whether layers compute in bfloat16; weights, their sums and batch norm stay
                     float32
    sizes            sides that the square images are resized to, each for an equal part of all
                     steps; none: images stay as they are
    """

    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    warmup: float = 0.0
    anneal: bool = False
    average: float = 0.0
    crop: int = 0
    flip: bool = False
    cutout: int = 0
    smoothing: float = 0.0
    channels_last: bool = False
    bfloat16: bool = False
    sizes: tuple[int, ...] = ()


TWO_EPOCH = Schedule(epochs=2, batch_size=4, learning_rate=0.001)
BEST = Schedule(
    epochs=100,
    batch_size=256,
    learning_rate=0.1,
    nesterov=True,
    weight_decay=5e-4,
    warmup=0.1,
    anneal=True,
    average=0.999,
    crop=2,
    flip=True,
)
# Digits are few and easy, and the mirror image of a digit is not that digit.
BEST_DIGITS = replace(BEST, epochs=30, batch_size=32, learning_rate=0.01, average=0.99, flip=False)
SCHEDULES = ("two-epoch", "best")
RESIDUAL = Schedule(
    epochs=60,
    batch_size=64,
    learning_rate=0.1,
    nesterov=True,
    weight_decay=5e-4,
    warmup=0.15,
    anneal=True,
    crop=4,
    flip=True,
    channels_last=True,
    bfloat16=True,
    sizes=(16, 16, 24, 24, 24, 24, 32, 32),
)
"""Small images first: an epoch takes 0.6 of the time. Hoffer et al.: Mix & Match: training convnets
with mixed image sizes (2019). ResNet-20 then has 82.0 % after 8 epochs, in the time in which 5
epochs of whole images give it 79.1 %."""
AGAIN = replace(RESIDUAL, learning_rate=0.05, warmup=0.05, cutout=8, smoothing=0.1, sizes=(24, 32))
"""What follows: more of what makes a network generalise, and less of what makes it learn fast."""
GENTLE = 2e-4
"""Weight decay of networks with depthwise convolutions, whose few weights need what they have."""
NETWORK_SCHEDULES: Mapping[str, tuple[Schedule, ...]] = {
    "resnet8": (
        replace(RESIDUAL, epochs=100),
        # Too small to overfit.
        replace(AGAIN, epochs=30, weight_decay=1e-4, cutout=0, smoothing=0.0),
    ),
    "resnet20": (RESIDUAL, AGAIN),
    "mobilenetv2": (
        replace(RESIDUAL, epochs=36, weight_decay=GENTLE),
        replace(AGAIN, epochs=36, weight_decay=GENTLE),
    ),
    "mobilenetv3": (replace(RESIDUAL, epochs=36, weight_decay=GENTLE, bfloat16=False),),
}
"""As many epochs as take about an hour on two cores; where bfloat16 is slower, it is not used: the
backward pass of a depthwise 5x5 convolution takes four times as long in it."""


def schedule_for(name: str, data: str) -> Schedule:
    """The schedule "two-epoch" or "best" for a data set's name."""
    if name == "two-epoch":
        return TWO_EPOCH
    if name == "best":
        return BEST_DIGITS if data == "digits" else BEST
    raise IntactError(f"there is no schedule {name!r}. There are: {', '.join(SCHEDULES)}.")


class Progress(Protocol):
    """Told about every step: how far the training is, and how it goes in this epoch so far."""

    def __call__(self, epoch: int, step: int, total: int, loss: float, accuracy: float) -> None:
        """`step` of `total` steps of `epoch`, which counts from 1, are done.

        The training loss and accuracy are means over the images of the epoch so far.
        """


def train(
    model: nn.Module,
    dataset: Dataset,
    schedules: Schedule | Sequence[Schedule],
    seed: int,
    *,
    checkpoint: str | PathLike[str] | None = None,
    resume: bool = False,
    threads: int = 1,
    progress: Progress | None = None,
) -> None:
    """Train `model` in place on the training set alone, and leave it in eval mode.

    schedules   one, or several that follow each other: each starts with the weights that the one
                before ended with, and with no momenta. Loshchilov, Hutter: SGDR: stochastic
                gradient descent with warm restarts (2017)
    model       one with buffers, as of batch norm, is refused where weights are averaged: its
                statistics are those of the last step's weights
    checkpoint  a file, written atomically after every epoch: what an interruption leaves
    resume      go on from the checkpoint if there is one. The result is then that of a run that was
                never interrupted. A checkpoint of another model, data set, seed or other schedules
                raises `StorageError`
    threads     that share the work; another number gives other weights
    progress    called after every step

    A loss that is not finite raises `IntactError`.
    """
    schedules = (schedules,) if isinstance(schedules, Schedule) else tuple(schedules)
    path = None if checkpoint is None else Path(checkpoint)
    # A run is determined by these; only a run that agrees in all of them may be resumed.
    settings = {
        "schedules": [_as_json(schedule) for schedule in schedules],
        "seed": seed,
        "threads": threads,
        "dataset": dataset.sha256,
        "initial_weights": hashlib.sha256(_to_bytes(dict(model.named_parameters()))).hexdigest(),
    }
    stored = None
    if resume and path is not None and path.exists():
        stored = _read_checkpoint(path, settings)
    with _threads(threads), _without_strides(model):
        before = 0
        for schedule in schedules:
            after = before + schedule.epochs
            if stored is None or stored.epochs <= after:
                run = _Run(model, dataset, schedule, seed, before)
                first = run.restore(stored) if stored is not None else before
                stored = None
                for epoch in range(first, after):
                    run.epoch(epoch, progress)
                    if path is not None:
                        run.store(path, settings, epoch + 1)
                run.finish()
            before = after


class _Run:
    """The state of a training by one schedule: weights, momenta, averages and buffers by name.

    before  epochs of the schedules before this one; the numbers of its own go on from there
    """

    def __init__(
        self, model: nn.Module, dataset: Dataset, schedule: Schedule, seed: int, before: int
    ) -> None:
        if schedule.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.buffers = dict(model.named_buffers())
        if self.buffers and schedule.average:
            raise IntactError(
                f"a model with buffers, {list(self.buffers)[:3]}, has statistics that do not fit "
                "averaged weights. Train it with average=0."
            )
        self.model, self.dataset, self.schedule, self.seed = model, dataset, schedule, seed
        self.before = before
        self.parameters = dict(model.named_parameters())
        self.momenta = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.steps = math.ceil(len(dataset.train_images) / schedule.batch_size)
        self.optimizer = torch.optim.SGD(
            self.parameters.values(),
            lr=schedule.learning_rate,
            momentum=schedule.momentum,
            nesterov=schedule.nesterov,
            weight_decay=schedule.weight_decay,
            fused=True,
        )
        for name, parameter in self.parameters.items():
            # The first step then computes 0.9 * 0 + gradient: what a fresh optimizer does as well.
            self.optimizer.state[parameter]["momentum_buffer"] = self.momenta[name]

    def epoch(self, epoch: int, progress: Progress | None) -> None:
        """Run the epoch of this number, counted from 0."""
        rng = np.random.default_rng((self.seed, epoch))
        images, labels = self.dataset.train_images, self.dataset.train_labels
        order = rng.permutation(len(images))
        size, seen, correct, loss_sum = self.schedule.batch_size, 0, 0, 0.0
        self.model.train()
        for step in range(self.steps):
            chosen = order[step * size : (step + 1) * size]
            pixels = augment(images[chosen], self.schedule, rng)
            logits, loss = self._step(
                (epoch - self.before) * self.steps + step,
                torch.from_numpy(to_input(pixels)),
                torch.from_numpy(labels[chosen]),
            )
            if progress is not None:
                seen += len(chosen)
                correct += int((logits.argmax(1).numpy() == labels[chosen]).sum())
                loss_sum += float(loss) * len(chosen)
                progress(epoch + 1, step + 1, self.steps, loss_sum / seen, correct / seen)
        if not math.isfinite(loss):
            raise IntactError(
                f"the training diverged in epoch {epoch + 1}: its loss is {float(loss)}. Try "
                "another seed or a lower learning rate."
            )

    def _step(
        self, number: int, x: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = self.schedule.epochs * self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.schedule, number, total)
        self.optimizer.zero_grad()
        if self.schedule.sizes:
            side = self.schedule.sizes[number * len(self.schedule.sizes) // total]
            if side != x.shape[-1]:
                x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        if self.schedule.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.schedule.bfloat16):
            logits = self.model(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=self.schedule.smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.schedule.average:
            # Young averages forget faster, so that they do not remember the random initial weights.
            decay = min(self.schedule.average, (1 + number) / (10 + number))
            for name, parameter in self.parameters.items():
                self.averages[name].lerp_(parameter.detach(), 1 - decay)
        return logits.detach(), loss.detach()

    def finish(self) -> None:
        """Give the model its result, in eval mode."""
        if self.schedule.average:
            self.model.load_state_dict(self.averages)
        self.model.eval()

    def _tensors(self) -> dict[str, torch.Tensor]:
        groups: dict[str, Mapping[str, torch.Tensor]] = {
            "weight": self.parameters,
            "momentum": self.momenta,
            "average": self.averages,
            "buffer": self.buffers,
        }
        return {
            f"{group}:{name}": tensor.detach()
            for group, named in groups.items()
            for name, tensor in named.items()
        }

    def store(self, path: Path, settings: Mapping[str, Any], epochs: int) -> None:
        """Write the checkpoint of a run of these settings that has finished this many epochs."""
        about = {"settings": settings, "epochs": epochs}
        _write(path, self._tensors(), ("checkpoint", about))

    def restore(self, stored: _Checkpoint) -> int:
        """Take over a checkpoint's state; returns the number of epochs that it has finished."""
        wanted = self._tensors()
        if (
            _layout(stored.tensors) != _layout(wanted)
            or not self.before <= stored.epochs <= self.before + self.schedule.epochs
        ):
            raise StorageError(
                f"{stored.path} does not hold the state of this training. Start without resuming."
            )
        for name, tensor in wanted.items():
            tensor.copy_(stored.tensors[name])
        return stored.epochs


def _as_json(schedule: Schedule) -> dict[str, Any]:
    """The fields of a schedule as they come back from a JSON file."""
    fields: dict[str, Any] = json.loads(json.dumps(asdict(schedule)))
    return fields


def _layout(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def learning_rate(schedule: Schedule, step: int, total: int) -> float:
    """The learning rate of a step, counted from 0, of `total` steps."""
    warmup = schedule.warmup * total
    if step + 1 < warmup:
        return schedule.learning_rate * (step + 1) / warmup
    if not schedule.anneal:
        return schedule.learning_rate
    progress = max(0.0, step - warmup) / (total - warmup)
    return schedule.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def augment(images: Images, schedule: Schedule, rng: np.random.Generator) -> Images:
    """A copy of each image as `schedule` changes it at random, uint8 `[N, 3, H, W]`.

    It is shifted and mirrored, and of a square of it only mid-grey is left. DeVries, Taylor:
    Improved regularization of convolutional neural networks with cutout (2017).
    """
    number, _, height, width = images.shape
    crop = schedule.crop
    if crop:
        margin = ((0, 0), (0, 0), (crop, crop), (crop, crop))
        windows = np.lib.stride_tricks.sliding_window_view(
            np.pad(images, margin), (height, width), axis=(2, 3)
        )
        top, left = rng.integers(2 * crop + 1, size=(2, number))
        images = windows[np.arange(number), :, top, left]
    if schedule.flip:
        mirrored = rng.random((number, 1, 1, 1)) < 0.5
        images = np.where(mirrored, images[..., ::-1], images)
    if schedule.cutout:
        rows = _within(height, schedule.cutout, number, rng)[:, None, :, None]
        columns = _within(width, schedule.cutout, number, rng)[:, None, None, :]
        images = np.where(rows & columns, np.uint8(128), images)
    return images


def _within(length: int, size: int, number: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Which of `length` places a stretch of `size` with a random centre covers, `[number, length]`.

    Every place is the centre equally often, so stretches end at the border.
    """
    starts = rng.integers(length, size=(number, 1)) - size // 2
    places = np.arange(length)
    return (starts <= places) & (places < starts + size)


def predict(model: nn.Module, images: Images) -> npt.NDArray[np.int64]:
    """The predicted class of each image, int64 `[N]`."""
    model.eval()
    unknown = np.zeros(len(images), np.int64)
    with torch.inference_mode():
        parts = [
            model(torch.from_numpy(x)).argmax(1).numpy() for x, _ in batches(images, unknown, 500)
        ]
    return np.concatenate(parts)


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training ended with: its file, and the result on the test set."""

    path: Path
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """The fraction of test images that the network classifies correctly."""
        return self.correct / self.total


def train_lenet(
    dataset: Dataset,
    bias: Bias,
    schedule: str,
    seed: int,
    out: str | PathLike[str],
    *,
    command: str,
    resume: bool = False,
    progress: Progress | None = None,
) -> Trained:
    """Train a LeNet from its seed, and write its weights to the safetensors file `out`.

    The file is what `read_lenet` reads. The JSON text "training" in its header says how the weights
    came about, `command` included. While the training runs, its checkpoint is at
    `OUT.checkpoint`; with `resume`, a run that was interrupted goes on from there.
    """
    settings = schedule_for(schedule, dataset.name)
    about = {"network": "LeNet", "bias": bias, "schedule": {"name": schedule, **asdict(settings)}}
    return _train_to_file(
        lambda: LeNet(bias), dataset, settings, seed, out, about, command, resume, progress
    )


def network_schedules(network: str, data: str, epochs: int | None = None) -> tuple[Schedule, ...]:
    """How a network of `NETWORKS` is trained on a data set: schedules that follow each other.

    data    the data set's name; digits are not mirrored
    epochs  only so many, all by the first schedule
    """
    schedules = NETWORK_SCHEDULES[network]
    if epochs is not None:
        schedules = (replace(schedules[0], epochs=epochs),)
    return tuple(replace(schedule, flip=data != "digits") for schedule in schedules)


def train_network(
    network: str,
    dataset: Dataset,
    schedules: Sequence[Schedule],
    seed: int,
    out: str | PathLike[str],
    *,
    command: str,
    resume: bool = False,
    threads: int = 1,
    progress: Progress | None = None,
) -> Trained:
    """Train a network of `NETWORKS` from its seed, and write its weights to the file `out`.

    As `train_lenet`; the file is what `read_network` reads, and `network_schedules` has the
    schedules.
    """
    about = {
        "network": NETWORKS[network].title,
        "schedules": [asdict(schedule) for schedule in schedules],
    }
    make = NETWORKS[network].make
    return _train_to_file(
        make, dataset, schedules, seed, out, about, command, resume, progress, threads
    )


def _train_to_file(
    make: Callable[[], nn.Module],
    dataset: Dataset,
    schedules: Schedule | Sequence[Schedule],
    seed: int,
    out: str | PathLike[str],
    about: Mapping[str, Any],
    command: str,
    resume: bool,
    progress: Progress | None,
    threads: int = 1,
) -> Trained:
    """Train what `make` initialises from the seed; see `train_lenet`.

    about  what the header says of network and schedule
    """
    size, classes = dataset.train_images.shape[1:], len(dataset.classes)
    if size != INPUT_SHAPE or classes > CLASSES:
        raise DataError(
            f"{about['network']} takes {list(INPUT_SHAPE)} images of at most {CLASSES} classes, "
            f"not {list(size)} of {classes}."
        )
    path = Path(out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
    checkpoint = path.with_name(path.name + ".checkpoint")
    if checkpoint.exists() and not resume:
        raise StorageError(
            f"{checkpoint} is there, from a training that was interrupted. Go on from it with "
            "--resume, or delete it to start anew."
        )
    train(
        model,
        dataset,
        schedules,
        seed,
        checkpoint=checkpoint,
        resume=resume,
        threads=threads,
        progress=progress,
    )
    with _threads(threads):
        correct = int((predict(model, dataset.test_images) == dataset.test_labels).sum())
    result = Trained(path, correct, len(dataset.test_labels))
    facts = {
        **about,
        "command": command,
        "data": {"name": dataset.name, "sha256": dataset.sha256},
        "seed": seed,
        "test": {"correct": correct, "total": result.total, "accuracy": result.accuracy},
        "threads": threads,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }
    _write(path, model.state_dict(), ("training", facts))
    checkpoint.unlink(missing_ok=True)
    return result


# -- files ---------------------------------------------------------------------------------------


def _write(path: Path, tensors: Mapping[str, torch.Tensor], about: tuple[str, Any]) -> None:
    """Write a safetensors file with one metadata entry: several would stand in random order."""
    key, value = about
    metadata = {key: json.dumps(value, sort_keys=True)}
    write_atomically(path, _to_bytes(tensors, metadata))


def _to_bytes(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file, whose tensors are in row-major order however they are in memory."""
    return to_safetensors({name: t.contiguous() for name, t in tensors.items()}, metadata)


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """What a checkpoint file holds: the number of finished epochs, and the tensors of a `_Run`."""

    path: Path
    epochs: int
    tensors: Mapping[str, torch.Tensor]


def _read_checkpoint(path: Path, settings: Mapping[str, Any]) -> _Checkpoint:
    """The checkpoint of a run of these settings; any other raises `StorageError`."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["checkpoint"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        given, epochs = dict(about["settings"]), int(about["epochs"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StorageError(
            f"{path} is not a checkpoint that can be read ({error}). Start without resuming."
        ) from error
    different = [key for key, value in settings.items() if given.get(key) != value]
    if different:
        raise StorageError(
            f"{path} is the checkpoint of another training: it differs in "
            f"{', '.join(different)}. Give the same settings again, or start without resuming."
        )
    return _Checkpoint(path, epochs, tensors)


@contextmanager
def _without_strides(model: nn.Module) -> Iterator[None]:
    """Let depthwise convolutions with a stride compute all outputs, and drop those in between.

    The numbers are the same. oneDNN has no fast backward pass of a strided one in bfloat16: it
    takes several times as long as that of all outputs.
    """
    changed = []
    for module in model.modules():
        if not isinstance(module, nn.Conv2d) or module.stride == (1, 1):
            continue
        if module.groups == module.in_channels > 1:
            changed.append((module, module.stride, module.register_forward_hook(_every(module))))
            module.stride = (1, 1)
    try:
        yield
    finally:
        for module, stride, hook in changed:
            hook.remove()
            module.stride = stride


def _every(conv: nn.Conv2d) -> Callable[[nn.Module, object, torch.Tensor], torch.Tensor]:
    """A hook that keeps of all outputs those that the convolution's stride reaches."""
    vertical, horizontal = conv.stride
    return lambda _module, _inputs, y: y[:, :, ::vertical, ::horizontal]


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
