"""ResNet-20: its shape, what it computes, its training, and the program that it becomes."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

import intact
from intact.data import Dataset, load_dataset, to_input
from intact.errors import DataError, StorageError
from intact.ops import Add, Conv2d, GlobalAvgPool, Linear, Requantize, Reshape
from intact.training import network_schedules, predict, train_network
from intact.zoo import ResNet20, read_network


def model(seed: int = 0) -> ResNet20:
    """Random weights and random statistics, so that no batch norm is the identity."""
    torch.manual_seed(seed)
    network = ResNet20()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    return network.eval()


def test_it_has_the_size_of_the_paper():
    """0.27 million parameters, and the two projections of option B."""
    weights = [p for name, p in ResNet20().named_parameters() if p.ndim > 1]
    paper = 9 * (3 * 16 + 6 * 16 * 16 + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64) + 64 * 10
    assert sum(p.numel() for p in weights) == paper + 16 * 32 + 32 * 64
    convolutions = [m for m in ResNet20().modules() if isinstance(m, torch.nn.Conv2d)]
    assert sorted(m.kernel_size for m in convolutions) == [(1, 1)] * 2 + [(3, 3)] * 19


def test_it_computes_the_layers_of_its_definition():
    """In float64, with batch norm written out, against names of the state dict alone."""
    network = model().double()
    w = network.state_dict()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, var, gain, shift = (
            w[f"{name}.{part}"].reshape(-1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * gain + shift

    def conv(x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        weight = w[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = norm(conv(x, "conv1"), "bn1").relu()
    for stage in (1, 2, 3):
        for block in range(3):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            inner = norm(conv(y, f"{name}.conv1", stride), f"{name}.bn1").relu()
            outer = norm(conv(inner, f"{name}.conv2"), f"{name}.bn2")
            if stride == 2:
                y = norm(conv(y, f"{name}.shortcut.0", 2), f"{name}.shortcut.1")
            y = (outer + y).relu()
    expected = y.mean((2, 3)) @ w["fc.weight"].T + w["fc.bias"]
    with torch.inference_mode():
        torch.testing.assert_close(network(x), expected, rtol=1e-10, atol=1e-10)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return to_input(load_dataset("digits").train_images[:16])


@pytest.fixture(scope="module")
def program(images) -> intact.Program:
    return intact.quantize(model(), [torch.from_numpy(images)])


def test_it_becomes_a_program_of_integers_with_the_names_of_its_layers(program):
    """An input that is added as it is goes to the sum's scale first; a projection yields it."""
    kinds = [type(op) for op in program.ops]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        Conv2d: 21, Add: 9, Requantize: 7, GlobalAvgPool: 1, Reshape: 1, Linear: 1,
    }  # fmt: skip
    names = {op.name for op in program.ops}
    assert {"conv1", "layer1.0.conv2", "layer2.0.shortcut.0", "fc"} <= names
    assert sum(map(program.macs, program.ops)) == pytest.approx(40.8e6, rel=0.01)
    assert program.tensors["fc"].shape == (10,)


def test_the_program_stays_close_to_the_float_network(program, images):
    with torch.inference_mode():
        expected = model()(torch.from_numpy(images)).numpy()
    noise = program.run(images, engine="torch") - expected
    assert 10 * math.log10(expected.var() / noise.var()) > 20


# -- training and files --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few() -> Dataset:
    data = load_dataset("digits")
    return replace(
        data,
        train_images=data.train_images[:48],
        train_labels=data.train_labels[:48],
        test_images=data.test_images[:20],
        test_labels=data.test_labels[:20],
    )


def test_the_schedule_suits_the_data():
    cifar10, again = network_schedules("resnet20", "cifar10")
    assert (cifar10.momentum, cifar10.nesterov, cifar10.weight_decay) == (0.9, True, 5e-4)
    assert (cifar10.batch_size, cifar10.crop, cifar10.flip, cifar10.average) == (64, 4, True, 0)
    assert cifar10.anneal
    assert again.learning_rate < cifar10.learning_rate
    assert (again.cutout, again.smoothing, cifar10.cutout, cifar10.smoothing) == (8, 0.1, 0, 0)
    digits = network_schedules("resnet20", "digits")
    assert digits == (replace(cifar10, flip=False), replace(again, flip=False))
    assert network_schedules("resnet20", "digits", 5) == (replace(digits[0], epochs=5),)


def test_training_writes_a_file_that_is_read_again(few, tmp_path):
    out = tmp_path / "resnet20.safetensors"
    schedule = replace(network_schedules("resnet20", "digits", 1)[0], batch_size=16)
    result = train_network("resnet20", few, [schedule], 3, out, command="intact train …")
    assert list(tmp_path.iterdir()) == [out]
    network = read_network("resnet20", out)
    assert not network.training
    assert result.correct == (predict(network, few.test_images) == few.test_labels).sum()
    assert network.bn1.num_batches_tracked == 3
    with safe_open(out, framework="pt") as file:
        about = json.loads(file.metadata()["training"])
    assert (about["network"], about["seed"], about["schedules"][0]["epochs"]) == (
        "ResNet-20",
        3,
        1,
    )


def test_images_of_another_size_are_refused(few, tmp_path):
    small = replace(few, train_images=few.train_images[..., :16, :16])
    with pytest.raises(DataError, match=r"ResNet-20 takes \[3, 32, 32\] images"):
        train_network(
            "resnet20",
            small,
            network_schedules("resnet20", "digits", 1),
            0,
            tmp_path / "w",
            command="",
        )


def test_everything_wrong_with_a_file_is_listed_at_once(tmp_path):
    state = model().state_dict()
    del state["conv1.weight"]
    state["extra"] = torch.zeros(1)
    state["bn1.num_batches_tracked"] = torch.tensor(1.0)
    state["fc.bias"][3] = torch.nan
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    with pytest.raises(StorageError) as error:
        read_network("resnet20", path)
    for part in (
        "does not hold the weights of a ResNet-20: ",
        "conv1.weight is missing",
        "extra is not part of the network",
        "bn1.num_batches_tracked is float32, not int64",
        "fc.bias holds NaN",
    ):
        assert part in str(error.value)
