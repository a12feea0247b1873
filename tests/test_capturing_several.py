"""Modules with several inputs and several results: what becomes of them, and in what order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import intact
from intact.analysis import analyse
from intact.calibrate import calibrate, split
from intact.capturing import capture
from intact.diagnosis import diagnose
from intact.errors import CalibrationError, CaptureError, DataError, IntactError
from intact.improve import correct_biases, equalize
from intact.network import Network
from intact.ops import Add, Clamp, Linear, Reshape
from intact.pipeline import quantize_network
from intact.staged import measure

torch.set_num_threads(1)


class Call(nn.Module):
    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.function(self, x) if self._modules else self.function(x)


class Fusion(nn.Module):
    """An image and facts about it, through one stem that is called twice, to scores and maps."""

    def __init__(self):
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, groups=4)
        self.facts, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, image, about):
        near = torch.relu(self.stem(image))
        far = self.depth(self.stem(image * 0.5))
        summary = near.mean((2, 3)) + self.facts(about)
        return {"scores": self.head(summary), "maps": [near, None, (far,)]}


def fusion() -> tuple[Fusion, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    return Fusion(), (torch.randn(12, 3, 8, 8), torch.randn(12, 5))


def results(module, x) -> list[torch.Tensor]:
    with torch.no_grad():
        out = module(*x)
    return [out["scores"], out["maps"][0], out["maps"][2][0]]


# -- capture -------------------------------------------------------------------------------------


def test_inputs_have_the_names_of_the_parameters_and_outputs_the_order_of_the_result():
    module, x = fusion()
    network = capture(module, x)
    assert network.inputs == ("image", "about")
    assert network.outputs == ("head", "stem", "depth")
    assert dict(network.returned) == {
        "head": "['scores']",
        "stem": "['maps'][0]",
        "depth": "['maps'][2][0]",
    }
    assert [network.tensors[name].shape for name in network.outputs] == [(3,), (4, 8, 8), (4, 6, 6)]
    expected = results(module, x)
    for form in (x, list(x), {"about": x[1], "image": x[0]}):
        with torch.no_grad():
            got = network(form)
        assert len(got) == 3
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    by_name = capture(module, {"about": x[1][:1], "image": x[0][:1]})
    assert (by_name.inputs, by_name.ops) == (network.inputs, network.ops)


def test_a_module_that_is_called_twice_has_a_layer_for_each_call_with_the_same_weights():
    module, x = fusion()
    network = capture(module, x)
    assert torch.equal(network.parameters["stem.weight"], network.parameters["stem_1.weight"])
    program = intact.quantize(module, [x])
    assert {"stem", "stem_1"} <= {op.name for op in program.ops}


def test_one_input_in_a_tuple_is_one_input():
    network = capture(nn.Sequential(nn.Linear(4, 2)), (torch.zeros(1, 4),))
    assert (network.inputs, network.outputs, dict(network.returned)) == (("input",), ("0",), {})


def test_further_tensors_of_a_forward_with_any_number_are_numbered():
    class Sum(nn.Module):
        def forward(self, first, *others, scale=1.0):
            return first * scale + others[0] + others[1]

    network = capture(Sum(), (torch.zeros(1, 4),) * 3)
    assert network.inputs == ("first", "others_0", "others_1")
    assert torch.equal(network((torch.ones(1, 4),) * 3), torch.full((1, 4), 3.0))


def test_a_layer_gives_way_to_an_input_of_its_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.facts = nn.Sequential(nn.Linear(4, 3)), nn.Linear(5, 3)

        def forward(self, image, facts):
            return self.image(image) + self.facts(facts)

    network = capture(Named(), (torch.zeros(1, 4), torch.zeros(1, 5)))
    assert network.inputs == ("image", "facts")
    assert [op.name for op in network.ops] == ["image.0", "facts_1", "add"]


def test_what_is_returned_is_not_fused_into_and_what_is_fused_is_not_returned():
    def forward(s, x):
        a = s.a(x)
        return F.relu(a), a

    network = capture(Call(forward, a=nn.Linear(4, 4)), torch.zeros(1, 4))
    assert network.ops == (Linear("a", ("input",)), Clamp("relu", ("a",)))
    assert network.outputs == ("relu", "a")
    assert network.tensors["a"].low == -float("inf")
    x = torch.randn(9, 4)
    high, raw = network(x)
    assert torch.equal(high, F.relu(raw))
    assert (raw < 0).any()


def test_batch_norm_is_not_folded_into_a_result():
    layers = {"conv": nn.Conv2d(3, 4, 1), "norm": nn.BatchNorm2d(4).eval()}
    layers["norm"].running_mean.fill_(2.0)

    def forward(s, x):
        y = s.conv(x)
        return y, s.norm(y)

    module = Call(forward, **layers).eval()
    network = capture(module, torch.zeros(1, 3, 4, 4))
    assert network.outputs == ("conv", "norm")
    x = torch.randn(2, 3, 4, 4)
    for got, expected in zip(network(x), module(x), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_tensor_that_is_returned_twice_and_an_input_that_is_returned_have_names_of_their_own():
    module = Call(lambda x: (x + x, x, [x + x, x.flatten(1)]))
    network = capture(module, torch.zeros(1, 4))
    assert network.ops == (
        Add("add", ("input", "input")),
        Add("add_1", ("input", "input")),
        Reshape("output", ("input",), (4,)),
        Reshape("output_1", ("input",), (4,)),
    )
    assert network.outputs == ("add", "output", "add_1", "output_1")

    def twice(x):
        y = x + x
        return y, y, y.flatten(1)

    network = capture(Call(twice), torch.zeros(1, 4))
    assert network.outputs == ("add", "output", "output_1")
    x = torch.randn(3, 4)
    assert all(torch.equal(out, x + x) for out in network(x))
    program = intact.quantize(Call(twice), [x])
    first, second, third = program.codes(x.numpy(), engine="reference")
    assert np.array_equal(first, second)
    assert np.array_equal(first, third)


def test_an_input_without_influence_is_refused():
    class Ignores(nn.Module):
        def forward(self, x, hint):
            hint + hint
            return x * 2, [x + 1]

    with pytest.raises(CaptureError, match="what Ignores returns does not depend on its input 'hi"):
        capture(Ignores(), (torch.zeros(1, 4), torch.zeros(1, 3)))


def test_each_example_is_checked():
    module, x = fusion()
    for bad, reason in [
        ((x[0], x[1].double()), "must be float32"),
        ((x[0], "about"), "a tuple of tensors for several inputs, not a str"),
        ((x[0], x[1][0]), "must be a batch"),
        ({"image": x[0]}, r"takes 2 inputs \(image, about\), but the example has 1"),
        ({"image": x[0], "other": x[1]}, "the module has no input 'other'; it has 'ima"),
        (
            (x[1], x[0]),
            r"batch of 11 samples of the example's shape, \[5\], \[3, 8, 8\]",
        ),
    ]:
        with pytest.raises(CaptureError, match=reason):
            capture(module, bad)


def test_a_network_refuses_what_does_not_fit_its_inputs():
    module, x = fusion()
    network = capture(module, x)
    for bad, reason in [
        (x[0], "the network has 2 inputs, 'image' and 'about': give a tuple"),
        ((x[1], x[0]), r"takes batches of 'image' of shape \[N, 3, 8, 8\], not \[12, 5\]"),
        ({"image": x[0]}, "nothing for the network's input 'about'"),
    ]:
        with pytest.raises(IntactError, match=reason):
            network(bad)
    with pytest.raises(IntactError, match="the network has 2 inputs, 'image' and 'about'; this"):
        _ = network.input
    with pytest.raises(IntactError, match="the network has 3 outputs"):
        _ = network.output


def test_a_network_is_checked_as_a_program_is():
    module, x = fusion()
    network = capture(module, x)

    def rebuilt(**changes) -> Network:
        fields = ("inputs", "outputs", "ops", "tensors", "parameters", "functions")
        return Network(**{**{name: getattr(network, name) for name in fields}, **changes})

    for changes, reason in [
        ({"outputs": ("head", "head")}, "the output 'head' is given out twice"),
        ({"outputs": ("image",)}, "the output 'image' is computed by no op"),
        ({"inputs": (*network.inputs, "third")}, "the input 'third' is read by no op"),
        ({"outputs": ()}, "at least one input and one output"),
    ]:
        with pytest.raises(IntactError, match=reason):
            rebuilt(**changes)


# -- batches -------------------------------------------------------------------------------------


def test_the_inputs_of_a_batch_are_told_from_its_labels():
    a, b, y = torch.zeros(2, 3), torch.ones(2, 4), torch.arange(2)
    for inputs, batch, expected in [
        (1, a, (a, None)),
        (1, (a, y), (a, y)),
        (1, [a, y], (a, y)),
        (1, (a,), (a, None)),
        (2, (a, b), ((a, b), None)),
        (2, [a, b], ((a, b), None)),
        (2, (a, b, y), ((a, b), y)),
        (2, ((a, b), y), ((a, b), y)),
        (2, ([a, b], None), ([a, b], None)),
        (2, {"a": a, "b": b}, ({"a": a, "b": b}, None)),
        (2, ({"a": a, "b": b}, y), ({"a": a, "b": b}, y)),
    ]:
        got, labels = split(batch, inputs)
        assert type(got) is type(expected[0])
        assert labels is expected[1]
        parts = zip(got, expected[0], strict=True)
        assert got is expected[0] or all(one is other for one, other in parts)


def test_every_form_of_a_batch_gives_the_same_program():
    module, x = fusion()
    labels = torch.zeros(12, dtype=torch.int64)
    forms = [x, list(x), (x, labels), (list(x), labels), (*x, labels)]
    forms += [{"about": x[1], "image": x[0]}, ({"image": x[0].numpy(), "about": x[1]}, labels)]
    programs = {intact.quantize(module, [form]).sha256 for form in forms}
    assert len(programs) == 1
    swapped = intact.quantize(module, [(x[0], x[1] * 3)])
    assert swapped.sha256 not in programs


def test_the_program_says_where_the_module_returned_its_outputs():
    module, x = fusion()
    program = intact.quantize(module, [x])
    assert program.outputs == ("head", "stem", "depth")
    assert program.info["outputs"].splitlines() == [
        "head = result['scores']",
        "stem = result['maps'][0]",
        "depth = result['maps'][2][0]",
    ]
    assert "outputs" not in intact.quantize(nn.Sequential(nn.Linear(4, 2)), [x[1][:, :4]]).info


@pytest.mark.parametrize("improve", ["bias", "equalize"])
def test_improvements_take_all_inputs_and_keep_all_outputs(improve):
    module, x = fusion()
    network = capture(module, x)
    if improve == "equalize":
        equal = equalize(network, calibrate(network, [x]))
        with torch.no_grad():
            for got, expected in zip(equal(x), network(x), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        return
    quantized = quantize_network(network, [x], intact.Recipe())
    assert quantized.corrected is not quantized.network  # it has a depthwise convolution
    corrected = correct_biases(quantized.network, quantized.program, x)
    for name, tensor in quantized.corrected.parameters.items():
        assert torch.equal(tensor, corrected.parameters[name]), name


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (lambda a, _: a, "a batch is a tensor|has 2 inputs"),
        (lambda a, b: (a, b[:3]), "batch 1: every input must have as many samples.*3 of 'about'"),
        (lambda a, b: (b, a), r"batch 1: input 'image': its shape is \[12, 5\]"),
        (lambda a, _: {"image": a}, "batch 1: there is nothing for the network's input 'about'"),
        (lambda a, b: (a, b.long()), "batch 1: input 'about': the images are torch.int64"),
        (lambda a, b: (a, b * float("nan")), "NaN"),
    ],
)
def test_a_batch_that_does_not_fit_the_inputs_is_named(batch, reason):
    module, x = fusion()
    with pytest.raises(CalibrationError, match=reason):
        intact.quantize(module, [x, batch(*x)])


# -- the stages ----------------------------------------------------------------------------------


def test_stages_measure_each_output_and_predict_with_the_first():
    module, x = fusion()
    scores, near, far = results(module, x)
    labels = scores.argmax(1)
    found = intact.stages(module, [x], [(x, labels)])
    assert found["float"].accuracy == 1.0
    assert np.array_equal(found.predictions["float"], labels.numpy())
    outputs = found.program.run(tuple(part.numpy() for part in x), engine="reference")
    for name, out, real in zip(found.program.outputs, outputs, (scores, near, far), strict=True):
        noise = np.square(out - real.numpy().astype(np.float64)).sum()
        expected = 10 * np.log10(np.square(real.numpy().astype(np.float64)).sum() / noise)
        assert found.sqnr_db["integer"][name] == pytest.approx(expected, abs=0.01)
    assert found["integer"].sqnr_db == min(found.sqnr_db["integer"].values())
    assert found["float"].sqnr_db is None
    unlabelled = intact.stages(module, [x], [(x, None)])
    flat = intact.stages(module, [x], [x])
    assert unlabelled["integer"] == flat["integer"]
    assert unlabelled["integer"].same == found["integer"].correct


def test_the_diagnosis_takes_every_output_for_one():
    # The first result is never negative and on a symmetric grid; so is a map that is read on.
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.map, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            y = torch.relu(self.map(x))
            return y.reshape(-1, 2, 2), self.last(y)

    torch.manual_seed(0)
    x = torch.randn(64, 4)
    recipe = intact.Recipe.from_toml('[output]\nscheme = "symmetric"\n', "own")
    made = quantize_network(capture(Heads(), x), [x], recipe)
    assert made.program.outputs == ("reshape", "last")
    analysis = analyse(made.network, made.program, made.sketches, recipe, [x])
    assert analysis.outputs == ("map", "last")
    stages = measure(made.network, made.program, [(x, None)])
    found = {finding.rule: finding for finding in diagnose(analysis, stages, 64)}
    assert found["one-sided"].layer == "map"
    assert found["one-sided"].recipe == 'output.scheme = "affine"\n'


def test_test_data_that_does_not_fit_the_inputs_is_refused():
    module, x = fusion()
    with pytest.raises(DataError, match="has 2 inputs"):
        intact.stages(module, [x], [x[0]])
    with pytest.raises(DataError, match=r"test inputs are torch\.int64"):
        intact.stages(module, [x], [((x[0], x[1].long()), None)])
    with pytest.raises(DataError, match="labels from 3 to 3, but the network has 3 outputs"):
        intact.stages(module, [x], [(x, torch.full((12,), 3))])
