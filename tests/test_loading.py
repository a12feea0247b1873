"""A user's own network from a command line's words: what loads, and how mistakes are answered."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.export import Dim, export, save

from intact.capturing import capture
from intact.capturing.exporting import required_inputs
from intact.errors import ModelError, ModelWarning
from intact.loading import input_shape, input_shapes, load_model
from intact.zoo import ResNet8, load_lenet

NET = """\
import torch
from torch import nn
from parts import WIDTH

class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.fc = nn.Linear(WIDTH, classes)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))

def make():
    print("made")
    return Net()

def sized(classes, *, depth):
    return Net(classes)

def nothing():
    Net()

def broken():
    return Net(classes="ten")

ready = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
NUMBER = 7
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "parts.py").write_text("WIDTH = 4\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("net", "parts", "bad", "deep"):
        sys.modules.pop(name, None)


def trained(folder: Path) -> nn.Module:
    """`Net` after a batch, so that its batch norm has statistics."""
    with pytest.warns(ModelWarning):
        net = load_model(f"{folder}/net.py:make")
    net.train()(torch.randn(8, 3, 5, 5))
    return net.eval()


def refused(message: str, *arguments: object) -> str:
    with pytest.raises(ModelError, match=message) as caught:
        load_model(*arguments)
    return str(caught.value)


def equal(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in theirs)


# -- code ----------------------------------------------------------------------------------------


def test_a_factory_of_a_file_is_called_and_finds_what_lies_beside_it(folder, monkeypatch, capsys):
    monkeypatch.chdir("/")
    before = list(sys.path)
    with pytest.warns(ModelWarning):
        net = load_model(f"{folder}/net.py:make")
    assert type(net).__name__ == "Net"
    assert not net.training
    assert sys.path == before
    assert capsys.readouterr() == ("", "made\n")  # standard output is for our own results


@pytest.mark.parametrize("spec", ["net.py:ready", "net:ready"])
def test_a_module_that_exists_is_taken_as_it_is(folder, spec):
    net = load_model(spec)
    assert isinstance(net, nn.Sequential)
    assert not net.training
    assert input_shape(net) is None


def test_a_class_whose_arguments_have_defaults_is_a_factory(folder):
    with pytest.warns(ModelWarning, match="never seen data: .* in norm. Are these the trained"):
        assert load_model("net:Net").fc.out_features == 10


def test_networks_of_the_zoo_go_by_name(tmp_path):
    torch.manual_seed(0)
    net = ResNet8()
    net.train()(torch.randn(4, 3, 32, 32))
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    loaded = load_model("resnet8", tmp_path / "w.safetensors")
    assert equal(loaded, net)
    assert input_shape(loaded) == (3, 32, 32)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("net.py", r"net.py is a file of code, but which network.*net.py:NAME"),
        ("net.py:", "no network 'net.py:' in the zoo, which has resnet8(.|\n)*give FILE.py:NAME"),
        (
            "resnet21",
            "no network 'resnet21' in the zoo(.|\n)*Do you mean resnet20?(.|\n)*give FILE.py:NAME",
        ),
        ("w.safetensors", "holds weights, which are no network without the code"),
        ("nowhere.py:make", "nowhere.py does not exist"),
        ("nowhere.net:make", "no module nowhere.net: Python knows no 'nowhere' here"),
        ("net.py:mkae", "net.py has no 'mkae'. Do you mean make?"),
        ("net.py:x", "net.py has no 'x'. It defines Net, make, sized, nothing, broken, ready"),
        ("net.py:NUMBER", "NUMBER of net.py is an int. Name a function"),
        ("net.py:nothing", "nothing of net.py gives None, not a torch.nn.Module. Does it return"),
        (
            "net.py:sized",
            r"needs arguments: classes, depth. (?s:.*)return sized\(classes=..., depth=...\)",
        ),
        ("net.py:broken", r"broken of net.py fails:\n  net.py:10: self.fc = .*\n  TypeError: "),
        ("nowhere.pt2", "nowhere.pt2 does not exist"),
    ],
)
def test_what_names_no_network_is_refused(folder, spec, message):
    refused(message, spec)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import torchvison\n", r"\n  bad.py:1: import torchvison\n  ModuleNotFoundError: No mod"),
        ("def f(:\n  pass\n", r"\n  bad.py:1: def f\(:\n  SyntaxError: invalid syntax"),
        ("x = 1\nimport deep\n", r"\n  deep.py:2: 1 / 0\n  ZeroDivisionError"),
        ("import sys\nsys.exit('usage')\n", r"\n  bad.py:2: sys.exit.*\n  It ends the interpreter"),
        ("raise ValueError\n", r"\n  bad.py:1: raise ValueError\n  ValueError: no message"),
        ("from .parts import x\n", r"\n  bad.py:1: from .*\n  ImportError: attempted relative"),
    ],
)
@pytest.mark.parametrize("spec", ["bad.py:make", "bad:make"])
def test_an_error_inside_the_users_code_is_told_with_its_line(folder, source, message, spec):
    (folder / "bad.py").write_text(source)
    (folder / "deep.py").write_text("\n1 / 0\n")
    refused(f"{spec.partition(':')[0]} cannot be imported:{message}", spec)
    assert str(folder) not in sys.path


# -- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "_orig_mod."])
def test_state_dicts_are_found_and_prefixes_stripped(folder, key, prefix):
    net = trained(folder)
    state = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    torch.save(state if key is None else {key: state, "epoch": 3}, "w.pt")
    assert equal(load_model("net.py:make", "w.pt"), net)  # and no warning


def test_safetensors_and_files_without_counters_load_too(folder):
    net = trained(folder)
    state = net.state_dict()
    save_file(state, "w.safetensors")
    assert equal(load_model("net.py:make", "w.safetensors"), net)
    del state["norm.num_batches_tracked"]
    torch.save(state, "w.pth")
    assert torch.equal(load_model("net.py:make", "w.pth").norm.running_var, net.norm.running_var)


def test_everything_that_does_not_fit_is_told_at_once(folder):
    state = trained(folder).state_dict()
    state["head.weight"] = state.pop("fc.weight")
    state["cnv.weight"] = state.pop("conv.weight")
    state["fc.bias"] = torch.zeros(7)
    state["extra"] = torch.zeros(2, 2)
    torch.save(state, "w.pt")
    assert refused("w.pt does not hold", "net.py:make", "w.pt").splitlines()[1:] == [
        "  conv.weight [4, 3, 3, 3] is missing; the file's cnv.weight has that shape",
        "  fc.weight [10, 4] is missing; the file's head.weight has that shape",
        "  head.weight [10, 4] is not part of the network; is it fc.weight?",
        "  cnv.weight [4, 3, 3, 3] is not part of the network; is it conv.weight?",
        "  extra [2, 2] is not part of the network",
        "  fc.bias has shape [7], not the network's [10]",
    ]


def test_a_pickle_is_never_run(folder):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (folder / "ran",))

    for value in ({"fc.weight": Trap()}, Trap(), load_lenet("digits", "all")):
        torch.save(value if not isinstance(value, Trap) else [value], "w.pt")
        refused("holds more than tensors, or is damaged, and is not read", "net.py:make", "w.pt")
    assert not (folder / "ran").exists()


def test_other_files_of_weights_are_refused(folder):
    torch.save([torch.zeros(3)], "list.pt")
    torch.save({"optimizer": {}, "epoch": 3}, "run.pt")
    Path("text.pth").write_text("text")
    Path("text.safetensors").write_text("text")
    for message, file in (
        ("holds a list, not a state dict", "list.pt"),
        ("no state dict: optimizer, epoch are no tensors. A checkpoint keeps it", "run.pt"),
        ("holds more than tensors, or is damaged", "text.pth"),
        ("cannot be read as a safetensors file", "text.safetensors"),
        ("none.pt does not exist", "none.pt"),
        ("weights come as .safetensors, .pt, .pth", "weights.npz"),
    ):
        refused(message, "net.py:make", file)


# -- exported programs ---------------------------------------------------------------------------

DYNAMIC = ({0: Dim("batch")},)


def exported(net: nn.Module, path: Path, shapes=DYNAMIC) -> Path:
    save(export(net, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=shapes), path)
    return path


class Shared(nn.Module):
    """A layer that is used twice, and operations outside of all layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(torch.relu(self.conv(x)) + x).flatten(1)


class Sides(nn.Module):
    """Two inputs, called as what runs an exported program may call its own arguments."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, model, inputs):
        return torch.relu(self.left(model)) + self.right(inputs)


def test_an_exported_program_keeps_the_names_of_its_inputs(tmp_path):
    torch.manual_seed(0)
    net, x = Sides().eval(), (torch.randn(5, 4), torch.randn(5, 2))
    dynamic = ({0: Dim("batch")},) * 2
    save(export(net, x, dynamic_shapes=dynamic), tmp_path / "net.pt2")
    program = load_model(str(tmp_path / "net.pt2"))
    assert input_shapes(program) == ((4,), (2,))
    assert required_inputs(program) == ["model", "inputs"]
    assert torch.equal(program(*x), net(*x))
    ours = capture(program, {"inputs": x[1], "model": x[0]})
    assert (ours.inputs, ours.ops) == (("model", "inputs"), capture(net, x).ops)
    assert torch.equal(ours(x), net(*x))
    copied = copy.deepcopy(program)
    with torch.no_grad():
        copied.get_submodule("left").weight.zero_()
    assert not torch.equal(copied(*x), net(*x))
    assert torch.equal(program(*x), net(*x))


class Graded(Shared):
    """Operations in a graph of their own, which is a constant of the outer one."""

    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


@pytest.mark.parametrize("make", [lambda: load_lenet("digits", "all"), ResNet8, Shared])
def test_an_exported_program_is_captured_as_its_module_would_be(make, tmp_path):
    torch.manual_seed(0)
    net = make().eval()
    program = load_model(str(exported(net, tmp_path / "net.pt2")))
    assert input_shape(program) == (3, 32, 32)
    assert equal(program, net)
    x = torch.randn(5, 3, 32, 32)
    assert torch.equal(program(x), net(x))
    ours, theirs = capture(program, x), capture(net, x)
    assert ours.ops == theirs.ops  # names too, which recipes refer to
    assert torch.equal(ours(x), theirs(x))


def test_an_exported_program_may_have_graphs_within(tmp_path):
    net = Graded().eval()
    program = load_model(str(exported(net, tmp_path / "net.pt2")))
    x = torch.randn(5, 3, 32, 32)
    assert torch.equal(capture(program, x)(x), net(x))


def test_an_exported_program_that_cannot_become_one_is_refused(tmp_path):
    path = tmp_path / "net.pt2"
    exported(ResNet8().eval(), path, None)
    refused(
        r"only inputs of shape \[2, 3, 32, 32\], of this one size.*dynamic_shapes=\(",
        path.as_posix(),
    )
    exported(ResNet8().train(), path)
    refused("exported in training mode: its batch_norm .* Call model.eval", path.as_posix())
    exported(nn.Sequential(nn.Conv2d(3, 3, 1)).eval(), path, ({0: Dim("n"), 2: Dim("h")},))
    refused(r"samples of many shapes, \[3, s\d+, 32\]. An integer program has one", path.as_posix())
    refused("holds its own weights: leave w.pt out", path.as_posix(), "w.pt")
    path.write_bytes(path.read_bytes()[:1000])
    text = refused("cannot be read as an exported program", path.as_posix())
    assert not re.search("Traceback|\n", text)
