"""LeNet: its shape, its weights' file, and what is wrong with another file."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from intact.data import load_dataset
from intact.errors import IntactError, StorageError
from intact.training import predict
from intact.zoo import BIASES, LeNet, load_lenet, read_lenet

SHAPES = {
    "conv1.weight": [6, 3, 5, 5],
    "conv2.weight": [16, 6, 5, 5],
    "fc1.weight": [120, 400],
    "fc2.weight": [84, 120],
    "fc3.weight": [10, 84],
}
INNER_BIASES = {"conv1.bias": [6], "conv2.bias": [16], "fc1.bias": [120], "fc2.bias": [84]}
LAST_BIAS = {"fc3.bias": [10]}
EXPECTED = {
    "none": SHAPES,
    "last": SHAPES | LAST_BIAS,
    "all": SHAPES | INNER_BIASES | LAST_BIAS,
}
SHIPPED = [(data, bias) for data in ("digits", "cifar10") for bias in BIASES]


@pytest.mark.parametrize("bias", BIASES)
def test_the_state_dict_has_the_documented_names_and_shapes(bias):
    state = LeNet(bias).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == EXPECTED[bias]


def test_an_unknown_bias_is_refused():
    with pytest.raises(IntactError, match="bias is 'some', but must be one of none, last, all"):
        LeNet("some")  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", BIASES)
def test_lenet_computes_its_layers_in_order(bias):
    """In float64, against loops over the definition."""
    torch.manual_seed(1)
    model = LeNet(bias).double()
    w = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def convolve(x: np.ndarray, name: str) -> np.ndarray:
        weight = w[f"{name}.weight"]
        side = x.shape[1] - 4
        out = np.zeros((len(weight), side, side))
        for y in range(side):
            for z in range(side):
                out[:, y, z] = np.tensordot(weight, x[:, y : y + 5, z : z + 5], 3)
        return out + w.get(f"{name}.bias", np.zeros(len(weight)))[:, None, None]

    def pool(x: np.ndarray) -> np.ndarray:
        c, h, v = x.shape
        return np.maximum(x, 0).reshape(c, h // 2, 2, v // 2, 2).max((2, 4))

    x = np.random.default_rng(0).uniform(-1, 1, (3, 32, 32))
    hidden = pool(convolve(pool(convolve(x, "conv1")), "conv2")).reshape(-1)
    for name in ("fc1", "fc2", "fc3"):
        hidden = w[f"{name}.weight"] @ hidden + w.get(f"{name}.bias", 0)
        if name != "fc3":
            hidden = np.maximum(hidden, 0)
    got = model(torch.from_numpy(x)[None]).detach().numpy()[0]
    np.testing.assert_allclose(got, hidden, rtol=1e-12, atol=1e-12)


# -- shipped weights -----------------------------------------------------------------------------


def about(data: str, bias: str) -> dict:
    path = files("intact.zoo") / "weights" / f"lenet-{data}-{bias}.safetensors"
    with safe_open(str(path), framework="pt") as file:
        return json.loads(file.metadata()["training"])


@pytest.mark.parametrize(("data", "bias"), SHIPPED)
def test_shipped_weights_load_and_say_how_they_were_made(data, bias):
    model = load_lenet(data, bias)
    assert not model.training
    facts = about(data, bias)
    schedule = "two-epoch" if data == "cifar10" and bias != "all" else "best"
    assert facts["command"] == (
        f"intact train lenet --data {data} --bias {bias} --schedule {schedule} "
        f"--seed {facts['seed']} -o lenet-{data}-{bias}.safetensors"
    )
    assert facts["test"]["accuracy"] == facts["test"]["correct"] / facts["test"]["total"]


@pytest.mark.parametrize("bias", BIASES)
def test_shipped_weights_have_the_accuracy_on_the_digits_that_they_state(bias):
    data = load_dataset("digits")
    facts = about("digits", bias)
    assert facts["data"]["sha256"] == data.sha256
    correct = (predict(load_lenet("digits", bias), data.test_images) == data.test_labels).sum()
    # Another processor may round another way, which can move an image on the border.
    assert abs(int(correct) - facts["test"]["correct"]) <= 1
    assert correct >= 480


def test_the_two_epoch_networks_are_within_the_range_of_the_experiment():
    for bias in ("none", "last"):
        assert 0.515 <= about("cifar10", bias)["test"]["accuracy"] <= 0.555


def test_the_best_network_is_good():
    assert about("cifar10", "all")["test"]["accuracy"] >= 0.72


def test_weights_that_are_not_shipped_are_refused_with_the_command_that_makes_them():
    with pytest.raises(IntactError, match="intact train lenet --data folder --bias none"):
        load_lenet("folder", "none")


# -- files of the user's own ---------------------------------------------------------------------


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return LeNet("last").state_dict()


def test_a_file_of_weights_is_read_to_the_same_bits(state, tmp_path):
    save_file(state, tmp_path / "w.safetensors")
    got = read_lenet(tmp_path / "w.safetensors", "last").state_dict()
    assert all(torch.equal(got[name], state[name]) for name in state)


def read_changed(state: dict[str, torch.Tensor], path: Path) -> str:
    save_file(state, path)
    with pytest.raises(StorageError) as error:
        read_lenet(path, "last")
    return str(error.value)


def test_everything_wrong_with_a_file_is_listed_at_once(state, tmp_path):
    del state["conv1.weight"]
    state["conv3.weight"] = torch.zeros(1)
    state["fc1.weight"] = state["fc1.weight"].T.contiguous()
    state["fc2.weight"] = state["fc2.weight"].half()
    state["fc3.weight"][3, 4] = torch.nan
    state["fc3.bias"][0] = torch.inf
    message = read_changed(state, tmp_path / "w.safetensors")
    for part in (
        "w.safetensors does not hold the weights of a LeNet with bias 'last'",
        "conv1.weight is missing",
        "conv3.weight is not part of the network",
        "fc1.weight has shape [400, 120], not [120, 400]",
        "fc2.weight is float16, not float32",
        "fc3.weight holds NaN or infinity",
        "fc3.bias holds NaN or infinity",
    ):
        assert part in message
    assert "conv2" not in message


def test_the_weights_of_another_bias_are_refused(state, tmp_path):
    del state["fc3.bias"]
    assert "fc3.bias is missing" in read_changed(state, tmp_path / "w.safetensors")


@pytest.mark.parametrize("content", [b"", b"\x08", b"\xff" * 64, b"PK\x03\x04" * 20])
def test_a_file_that_is_not_safetensors_is_refused(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"w\.safetensors cannot be read as a safetensors file"):
        read_lenet(path, "last")


def test_a_truncated_file_is_refused(state, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError, match="cannot be read as a safetensors file"):
        read_lenet(path, "last")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(StorageError, match="cannot be read"):
        read_lenet(tmp_path / "nowhere", "last")
