"""`capture`: many architectures against the module itself, and every refusal with its words."""

from __future__ import annotations

import logging
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from intact.capturing import capture, survey
from intact.errors import CaptureError
from intact.ops import (
    Add,
    AvgPool2d,
    Clamp,
    Concat,
    Conv2d,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    Permute,
    Reshape,
)

torch.set_num_threads(1)


class Call(nn.Module):
    """A module whose forward is `f(x)`, or `f(self, x)` with its layers as attributes."""

    def __init__(self, f, **layers):
        super().__init__()
        self.f = f
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.f(self, x) if self._modules else self.f(x)


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, and batch norms that are nowhere near the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module.eval()


def both(module: nn.Module, shape, seed: int = 0):
    """(network, what it computes, what the module computes) on a batch of 4."""
    module = randomized(module, seed)
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(seed)) * 2
    network = capture(module, torch.zeros(2, *shape))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same'")
        return network, network(x), module(x.clone())


def kinds(network) -> list[str]:
    return [type(op).__name__ for op in network.ops]


# -- architectures --------------------------------------------------------------------------------


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5, bias=False), nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.dropout(F.relu(self.fc1(x)), training=self.training)
        return self.fc3(F.relu(self.fc2(x)))


class Residual(nn.Module):
    def __init__(self, cin, cout, stride, norm=True):
        super().__init__()
        bn = nn.BatchNorm2d if norm else nn.Identity
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = bn(cout)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = bn(cout)
        self.downsample = None
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), bn(cout))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


def resnet(norm: bool) -> nn.Module:
    return nn.Sequential(
        Residual(3, 8, 1, norm),
        Residual(8, 8, 1, norm),
        Residual(8, 12, 2, norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


def mobile_block(cin, cout, stride):
    layers = nn.Sequential(
        nn.Conv2d(cin, 4 * cin, 1, bias=False),
        nn.BatchNorm2d(4 * cin),
        nn.ReLU6(inplace=True),
        nn.Conv2d(4 * cin, 4 * cin, 3, stride, 1, groups=4 * cin, bias=False),
        nn.BatchNorm2d(4 * cin),
        nn.ReLU6(inplace=True),
        nn.Conv2d(4 * cin, cout, 1, bias=False),
        nn.BatchNorm2d(cout),
    )
    skip = stride == 1 and cin == cout
    return Call(lambda s, x: x + s.conv(x) if skip else s.conv(x), conv=layers)


def mobilenet() -> nn.Module:
    layers = {"drop": nn.Dropout(0.2), "fc": nn.Linear(6, 7)}
    head = Call(lambda s, x: s.fc(s.drop(x.mean([2, 3]))), **layers)
    return nn.Sequential(mobile_block(3, 5, 2), mobile_block(5, 5, 1), mobile_block(5, 6, 1), head)


def vgg() -> nn.Module:
    def block(cin, cout):
        return nn.Conv2d(cin, cout, 3, padding=1), nn.BatchNorm2d(cout), nn.ReLU(inplace=True)

    features = (*block(3, 8), nn.MaxPool2d(2), *block(8, 10), *block(10, 10), nn.MaxPool2d(2))
    head = (nn.Flatten(), nn.Linear(90, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout())
    return nn.Sequential(*features, *head, nn.Linear(16, 4))


def dense(s, x):
    x = torch.cat([x, F.relu(s.a(x))], 1)
    x = torch.cat([x, F.relu(s.b(x))], dim=-3)
    return F.avg_pool2d(s.c(x), 2)


def inception(s, x):
    pooled = F.avg_pool2d(x, 3, stride=1, padding=1)
    branches = [s.a(x), s.b2(F.relu(s.b(x))), s.c(pooled), F.max_pool2d(x, 3, 1, 1)]
    return torch.cat(branches, 1)


EXACT = {
    "lenet": (LeNet(), (3, 32, 32)),
    "resnet without norm": (resnet(norm=False), (3, 12, 12)),
    "dense": (
        Call(dense, a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Conv2d(7, 4, 1), c=nn.Conv2d(11, 5, 1)),
        (3, 9, 8),
    ),
    "inception": (
        Call(
            inception,
            a=nn.Conv2d(3, 4, 1),
            b=nn.Conv2d(3, 2, 1),
            b2=nn.Conv2d(2, 5, (1, 7), padding=(0, 3)),
            c=nn.Conv2d(3, 3, 1),
        ),
        (3, 10, 9),
    ),
    "same padding": (nn.Conv2d(3, 5, 3, padding="same"), (3, 9, 8)),
    "same padding, even kernel": (nn.Conv2d(3, 5, (4, 2), padding="same"), (3, 9, 8)),
    "same padding, dilated": (
        nn.Conv2d(3, 5, (2, 3), padding="same", dilation=(3, 2)),
        (3, 9, 8),
    ),
    "valid padding": (nn.Conv2d(3, 5, 3, padding="valid", stride=2), (3, 9, 8)),
    "geometry": (
        nn.Conv2d(6, 9, (3, 2), (2, 1), (1, 2), (1, 3), groups=3, bias=False),
        (6, 11, 13),
    ),
    "depthwise with multiplier": (nn.Conv2d(3, 6, 3, groups=3), (3, 9, 8)),
    "ceil mode": (nn.MaxPool2d(3, 2, ceil_mode=True), (3, 8, 11)),
    "ceil mode, padded": (nn.MaxPool2d(3, 2, 1, ceil_mode=True), (3, 8, 9)),
    "ceil mode, wide stride": (nn.MaxPool2d(2, 3, ceil_mode=True), (3, 8, 10)),
    "dilated max pool": (nn.MaxPool2d(2, 1, 1, dilation=2), (3, 8, 9)),
    "average pool": (nn.AvgPool2d((3, 2), (2, 1), (1, 0)), (3, 8, 9)),
    "average pool, ceil mode without effect": (nn.AvgPool2d(2, ceil_mode=True), (3, 8, 6)),
    "average pool, no padding to count": (
        nn.AvgPool2d(3, count_include_pad=False, divisor_override=9),
        (3, 9, 6),
    ),
    "adaptive average pool": (nn.AdaptiveAvgPool2d((2, 4)), (3, 4, 16)),
    "adaptive max pool": (nn.AdaptiveMaxPool2d((3, 1)), (3, 9, 8)),
    "mean, keepdim": (Call(lambda x: x.mean((-1, -2), keepdim=True)), (3, 9, 8)),
    "mean of a large map": (Call(lambda x: torch.mean(x, (2, 3))), (3, 33, 31)),
    "clamps": (
        Call(
            lambda s, x: torch.clip(s.a(x), -1, 0.7).clamp(min=-0.5).clamp_max(0.3),
            a=nn.Conv2d(3, 4, 1),
        ),
        (3, 5, 5),
    ),
    "clamp of impossible bounds": (Call(lambda x: (x + x).clamp(1, -1)), (3, 5)),
    "hardtanh": (nn.Sequential(nn.Linear(5, 6), nn.Hardtanh(-0.25, 0.5)), (5,)),
    "shapes": (
        Call(
            lambda s, x: s.fc(x.unsqueeze(1).squeeze(1).view(x.size(0), 3, -1)).reshape(len(x), -1),
            fc=nn.Linear(20, 4),
        ),
        (3, 4, 5),
    ),
    "squeeze": (Call(lambda x: F.max_pool2d(x, 4).squeeze()), (3, 4, 4)),
    "permute": (
        Call(
            lambda s, x: s.fc(x.permute(0, 2, 3, 1).contiguous()).transpose(1, -1).flatten(2),
            fc=nn.Linear(3, 4),
        ),
        (3, 4, 5),
    ),
    "sum of a list": (Call(lambda x: sum([x, F.relu(x), x])), (3, 5)),
    "weights that are computed": (
        Call(
            lambda s, x: F.linear(s.wn(x), s.fc.weight[:2] * 2),
            wn=nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)),
            fc=nn.Linear(6, 4),
        ),
        (5,),
    ),
    "channels last": (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).to(
            memory_format=torch.channels_last
        ),
        (3, 12, 12),
    ),
    "one number per sample": (
        Call(lambda s, x: s.fc(x).squeeze(1), fc=nn.Linear(5, 1)),
        (5,),
    ),
    "no_grad in forward": (Call(torch.no_grad()(lambda s, x: s.fc(x)), fc=nn.Linear(5, 4)), (5,)),
}


@pytest.mark.parametrize("name", EXACT)
def test_without_batch_norm_the_network_equals_the_module_bit_for_bit(name):
    _, got, expected = both(*EXACT[name])
    # A bare number per sample is a vector of length 1.
    assert torch.equal(got.reshape(expected.shape), expected)


def preactivation(s, x):
    x = s.conv(F.relu(s.bn1(x)))  # of the input
    y = s.bn2(x + x)  # of an addition
    z = s.bn3(x)  # of a tensor that others read too
    return torch.cat([F.relu6(y), s.bn5(s.bn4(F.max_pool2d(z, 3, 1, 1)))], 1)


NORMED = {
    "resnet": (resnet(norm=True), (3, 12, 12)),
    "mobilenet": (mobilenet(), (3, 12, 12)),
    "vgg": (vgg(), (3, 12, 12)),
    "preactivation": (
        Call(
            preactivation,
            conv=nn.Conv2d(3, 5, 3),
            bn1=nn.BatchNorm2d(3),
            **{f"bn{i}": nn.BatchNorm2d(5, affine=i != 4) for i in range(2, 6)},
        ),
        (3, 8, 8),
    ),
    "two norms after a layer": (
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4)),
        (3, 6, 6),
    ),
    "1-d norm after an activation": (
        nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)),
        (6,),
    ),
    "norm of the middle axis after a linear": (
        nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(3)),
        (3, 6),
    ),
}


@pytest.mark.parametrize("name", NORMED)
def test_with_batch_norm_the_network_equals_the_module_within_rounding(name):
    network, got, expected = both(*NORMED[name])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert all(p.dtype == torch.float32 for p in network.parameters.values())


def test_the_comparison_notices_one_weight_off_by_one_ulp():
    network, got, expected = both(*EXACT["lenet"])
    weight = network.parameters["fc3.weight"].clone()
    weight[0] = torch.nextafter(weight[0], torch.tensor(math.inf))
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(got, expected)
    assert not torch.equal(network(x), network.with_parameters({"fc3.weight": weight})(x))


def test_adaptive_average_pools_of_odd_windows_differ_by_a_rounding_at_most():
    network, got, expected = both(nn.AdaptiveAvgPool2d(2), (3, 6, 10))
    assert network.ops == (AvgPool2d("adaptive_avg_pool2d", ("input",), (3, 5), (3, 5)),)
    torch.testing.assert_close(got, expected, rtol=3e-7, atol=1e-7)


@st.composite
def networks(draw):
    """Small networks: a trunk of convolutions, clamps, pools and residual sums, and a head."""
    layers: list[nn.Module] = []
    channels = 3
    for _ in range(draw(st.integers(1, 4))):
        width = draw(st.integers(1, 6))
        groups = draw(st.sampled_from([1, channels])) if width % channels == 0 else 1
        kernel, same = draw(st.integers(1, 4)), draw(st.booleans())
        layers.append(
            nn.Conv2d(
                channels,
                width,
                kernel,
                stride=1 if same else draw(st.integers(1, 2)),
                padding="same" if same else draw(st.integers(2, 3)),
                groups=groups,
                bias=draw(st.booleans()),
            )
        )
        channels = width
        activations = (nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(), nn.Identity())
        layers.append(draw(st.sampled_from(activations)))
        if draw(st.booleans()):
            layer = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())
            layers.append(Call(draw(st.sampled_from(RESIDUALS)), body=layer))
        if draw(st.booleans()):
            layers.append(nn.MaxPool2d(3, 2, 1, ceil_mode=draw(st.booleans())))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))


RESIDUALS = (
    lambda s, x: F.relu(x + s.body(x)),
    lambda s, x: s.body(x).add_(x).clamp_(max=1),
    lambda s, x: x.relu_() + s.body(x) + x,
)


@settings(max_examples=6, deadline=None)
@given(networks(), st.integers(0, 99))
def test_random_networks_equal_their_modules_bit_for_bit(module, seed):
    _, got, expected = both(module, (3, 9, 10), seed)
    assert torch.equal(got, expected)


# -- canonical forms ------------------------------------------------------------------------------


def test_lenet_becomes_the_ops_and_names_that_its_author_knows():
    network = capture(LeNet(), torch.zeros(1, 3, 32, 32))
    assert [(op.name, type(op)) for op in network.ops] == [
        ("conv1", Conv2d),
        ("pool", MaxPool2d),
        ("conv2", Conv2d),
        ("pool_1", MaxPool2d),
        ("flatten", Reshape),
        ("fc1", Linear),
        ("fc2", Linear),
        ("fc3", Linear),
    ]
    relus = {name for name, spec in network.tensors.items() if spec.low == 0}
    assert relus == {"conv1", "conv2", "fc1", "fc2"}
    assert (network.input, network.output) == ("input", "fc3")
    expected = {f"{n}.{k}" for n in ("conv2", "fc1", "fc2", "fc3") for k in ("weight", "bias")}
    assert set(network.parameters) == expected | {"conv1.weight"}
    assert network.sources["conv1"].endswith("x = self.pool(F.relu(self.conv1(x)))")
    assert network.sources["conv1"].startswith("test_capturing.py:")


def test_a_resnet_has_no_op_but_convolutions_sums_and_the_head():
    network = capture(randomized(resnet(norm=True)), torch.zeros(1, 3, 12, 12))
    assert [op.name for op in network.ops] == [
        *("0.conv1", "0.conv2", "0.downsample.0", "0.add"),
        *("1.conv1", "1.conv2", "1.add"),
        *("2.conv1", "2.conv2", "2.downsample.0", "2.add"),
        *("3", "4", "5"),
    ]
    clamped = {name for name, spec in network.tensors.items() if spec.low == 0}
    assert clamped == {"0.conv1", "0.add", "1.conv1", "1.add", "2.conv1", "2.add"}
    assert isinstance(network.ops[-3], GlobalAvgPool)


def test_folding_is_done_in_float64_and_rounded_once():
    module = randomized(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)))
    conv, bn = module
    network = capture(module, torch.zeros(1, 2, 5, 5))
    factor = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    bias = (conv.bias.double() - bn.running_mean.double()) * factor + bn.bias.double()
    weight = conv.weight.double() * factor.view(-1, 1, 1, 1)
    torch.testing.assert_close(network.parameters["0.weight"], weight.float(), rtol=6e-8, atol=0)
    torch.testing.assert_close(network.parameters["0.bias"], bias.float(), rtol=6e-8, atol=1e-9)


def test_a_norm_that_cannot_be_folded_is_a_depthwise_convolution():
    module, shape = NORMED["preactivation"]
    network = capture(module, torch.zeros(1, *shape))
    found = {op.name: op for op in network.ops}
    assert found["bn1"] == Conv2d("bn1", ("input",), groups=3)
    assert found["bn2"] == Conv2d("bn2", ("add",), groups=5)
    assert found["bn3"] == Conv2d("bn3", ("conv",), groups=5)
    assert "bn5" not in found  # folded into bn4's convolution
    assert network.tensors["bn1"].low == 0
    assert (network.tensors["bn2"].low, network.tensors["bn2"].high) == (0, 6)


def test_a_clamp_fuses_only_where_nobody_else_reads_the_unclamped_tensor():
    def forward(s, x):
        y = s.a(x)
        return s.b(F.relu(y)) + y

    network = capture(Call(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), torch.zeros(1, 4))
    assert network.tensors["a"].low == -math.inf
    assert network.ops[1] == Clamp("relu", ("a",))
    assert network.tensors["relu"].low == 0


def test_a_second_clamp_does_not_reach_readers_of_the_first():
    def forward(s, x):
        y = F.relu(s.a(x))
        return s.b(y.clamp(max=1)) + y

    network, got, expected = both(Call(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), (4,))
    assert kinds(network) == ["Linear", "Clamp", "Linear", "Add"]
    assert (network.tensors["a"].low, network.tensors["a"].high) == (0, math.inf)
    assert (network.tensors["clamp"].low, network.tensors["clamp"].high) == (-math.inf, 1)
    assert torch.equal(got, expected)


def test_clamps_combine_and_one_after_a_max_pool_stands_alone():
    module = Call(lambda x: F.relu(F.max_pool2d(x, 2)).clamp(max=2).clamp(min=1))
    network = capture(module, torch.zeros(1, 3, 4, 4))
    assert kinds(network) == ["MaxPool2d", "Clamp"]
    spec = network.tensors[network.output]
    assert (spec.low, spec.high) == (1, 2)


def test_what_does_nothing_leaves_no_op():
    def idle(s, x):
        x = s.drop(s.same(x).contiguous().clone().detach()).view(x.shape).float()
        x = F.adaptive_avg_pool2d(F.adaptive_max_pool2d(x, (4, 4)), 4).permute(0, 1, 2, 3)
        s.unused(x)  # dead
        return s.conv(x).flatten(0, 0)

    layers = {"drop": nn.Dropout(), "same": nn.Identity(), "unused": nn.Conv2d(3, 3, 1)}
    module = Call(idle, conv=nn.Conv2d(3, 2, 1), **layers)
    network = capture(module, torch.zeros(1, 3, 4, 4))
    assert network.ops == (Conv2d("conv", ("input",)),)
    assert set(network.parameters) == {"conv.weight", "conv.bias"}


def test_a_mean_over_the_image_is_a_global_average_pool():
    network = capture(Call(lambda x: x.mean((2, 3))), torch.zeros(1, 3, 4, 4))
    assert network.ops == (
        GlobalAvgPool("mean", ("input",)),
        Reshape("mean.reshape", ("mean",), (3,)),
    )


def test_concat_and_permute_count_axes_without_the_batch():
    module = Call(lambda x: torch.cat([x, x], -1).permute(0, 3, 1, 2))
    network = capture(module, torch.zeros(1, 3, 4, 5))
    assert network.ops == (
        Concat("cat", ("input", "input"), 2),
        Permute("permute", ("cat",), (2, 0, 1)),
    )


def test_in_place_writes_reach_every_later_reader():
    def forward(s, x):
        y = s.a(x)
        flat = y.flatten(1)
        y.relu_()
        return flat + s.b(flat)

    module = Call(forward, a=nn.Conv2d(3, 2, 1), b=nn.Linear(8, 8))
    _, got, expected = both(module, (3, 2, 2))
    assert torch.equal(got, expected)


def test_a_module_that_overwrites_its_input_is_captured_for_its_output():
    network = capture(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)), torch.zeros(1, 4))
    assert kinds(network) == ["Clamp", "Linear"]
    x = torch.tensor([[-1.0, 2, -3, 4]])
    network(x)
    assert torch.equal(x, torch.tensor([[-1.0, 2, -3, 4]]))


def test_names_are_unique_and_readable():
    def forward(s, input):
        x = s.input(input) + input
        x = s.shared(s.shared(x)) + x
        return F.relu(s.relu(F.relu(x + x)).view(-1, 2, 2))

    module = Call(forward, input=nn.Linear(4, 4), shared=nn.Linear(4, 4), relu=nn.Hardtanh())
    network = capture(Call(lambda s, x: s.block(x), block=module), torch.zeros(1, 4))
    assert [op.name for op in network.ops] == [
        *("block.input", "block.add", "block.shared", "block.shared_1", "block.add_1"),
        *("block.add_2", "block.view"),
    ]
    shared = [network.parameters[f"block.{n}.weight"] for n in ("shared", "shared_1")]
    assert torch.equal(*shared)
    assert shared[0].data_ptr() != shared[1].data_ptr()


def test_the_input_gives_way_to_a_layer_called_input():
    network = capture(Call(lambda s, x: s.input(x), input=nn.Linear(4, 3)), torch.zeros(1, 4))
    assert (network.input, network.ops) == ("input_1", (Linear("input", ("input_1",)),))


def test_a_subclass_or_parametrization_of_a_torch_layer_is_a_layer():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight * 2, self.bias)

    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 2, 1))
    network, got, expected = both(nn.Sequential(Scaled(3, 4, 3), normed), (3, 6, 6))
    assert network.ops == (Conv2d("0", ("input",)), Conv2d("1", ("0",)))
    assert torch.equal(got, expected)


# -- the module is left alone ---------------------------------------------------------------------


def test_capture_takes_eval_mode_and_leaves_the_module_as_it_was():
    module = randomized(vgg()).train()
    module[1].eval()  # someone freezes one batch norm
    before = {k: v.clone() for k, v in module.state_dict().items()}
    flags = [m.training for m in module.modules()]
    x = torch.randn(3, 3, 12, 12)

    network = capture(module, x)
    assert [m.training for m in module.modules()] == flags
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(network(x), module.eval()(x), rtol=1e-5, atol=1e-5)


def test_parameters_are_detached_copies():
    module = nn.Linear(4, 3)
    network = capture(module, torch.zeros(1, 4))
    before = network.parameters["linear.weight"].clone()
    with torch.no_grad():
        module.weight.zero_()
    assert torch.equal(network.parameters["linear.weight"], before)
    assert not any(p.requires_grad for p in network.parameters.values())


def test_only_the_shape_of_the_example_matters():
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    ops = capture(module, torch.randn(2, 3, 4)).ops
    for example in (torch.zeros(1, 3, 4), torch.full((64, 3, 4), math.nan)):
        assert capture(module, example).ops == ops


def test_capture_leaves_warnings_and_logging_as_they_were(capfd):
    filters, disabled = list(warnings.filters), logging.root.manager.disable
    with pytest.raises(CaptureError):
        capture(Call(lambda x: x if x.sum() > 0 else -x), torch.zeros(1, 4))
    capture(nn.Conv2d(3, 3, 2, padding="same"), torch.zeros(1, 3, 4, 4))  # torch warns
    assert warnings.filters == filters
    assert logging.root.manager.disable == disabled
    assert capfd.readouterr() == ("", "")


# -- refusals -------------------------------------------------------------------------------------


class Unsupported(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 5), nn.FractionalMaxPool2d(2, 3))
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x):
        x = self.norm(self.body(x))
        left, right = x.chunk(2, 1)
        x = torch.cat([left, torch.where(left > 0, left, F.gelu(right))], 1)
        x = F.relu(x + torch.rand(3))
        return torch.topk(x.flatten(1), 3).values


def test_one_error_lists_every_offender_with_layer_source_line_and_advice():
    with pytest.raises(CaptureError) as error:
        capture(Unsupported(), torch.zeros(1, 3, 8, 8))
    text = str(error.value)
    assert text.startswith("5 operations of Unsupported cannot be captured:\n")
    items = text.split("\n\n")[1:-1]
    expected = [
        ("fractional_max_pool2d in body.1", "x = self.norm(self.body(x))", "random numbers"),
        ("batch_norm in norm", "x = self.norm(self.body(x))", "track_running_stats=True"),
        ("where in Unsupported", "x = torch.cat([left, torch.where", "two tensors"),
        ("rand in Unsupported", "x = F.relu(x + torch.rand(3))", "if self.training"),
        ("topk in Unsupported", "return torch.topk(x.flatten(1), 3)", "the network's output"),
    ]
    assert len(items) == len(expected)
    for i, (item, (what, code, advice)) in enumerate(zip(items, expected, strict=True), 1):
        head, source, reason = (line.strip() for line in item.splitlines())
        assert head == f"{i}. {what}"
        assert source.startswith("test_capturing.py:")
        assert code in source
        assert advice in reason
    assert text.splitlines()[-1].startswith("Supported: convolutions")


def test_a_survey_lists_what_capture_raises():
    found = survey(Unsupported(), torch.zeros(1, 3, 8, 8))
    assert found.network is None
    assert [r.function for r in found.refusals][:2] == ["fractional_max_pool2d", "batch_norm"]
    assert found.refusals[0].layer == "body.1"
    assert survey(nn.Linear(4, 3), torch.zeros(1, 4)).refusals == ()


IMAGE, VECTOR = (3, 8, 8), (6,)


def written(x, where):
    x[where] = 2 * x[where]
    return x


@pytest.mark.parametrize(
    ("f", "shape", "message"),
    [
        (lambda x: x.view(-1, 4), IMAGE, "1. view in Call(.|\n)*keep the batch as its first"),
        (lambda x: x.permute(1, 0, 2, 3), IMAGE, "It moves the batch"),
        (lambda x: x.transpose(0, -1), IMAGE, "It moves the batch"),
        (lambda x: torch.cat([x, x]), IMAGE, "It joins along the batch"),
        (lambda x: torch.add(x, x, alpha=2), IMAGE, "alpha = 2"),
        (lambda x: F.max_pool2d(x, 2, return_indices=True)[1], IMAGE, "not where they are"),
        (lambda x: x.max(1)[1].float(), IMAGE, "not where they are"),
        (lambda x: F.max_pool2d(x[:, :, :1], 2, 1, 1, 2), IMAGE, "nothing but padding"),
        (lambda x: F.max_pool2d(x, 2), (8, 8), r"takes batches of 4 dimensions"),
        (lambda x: F.dropout(x, 0.5), VECTOR, "drops in eval mode too"),
        (lambda x: F.linear(x, x), VECTOR, "weights depend on the input"),
        (lambda x: F.linear(x, torch.ones(6)) + x[:, 0], VECTOR, "Its weight has 1 dimension"),
        (lambda x: x + torch.rand(6), VECTOR, "1. rand in Call"),
        (lambda x: torch.fft.fft(x).real, VECTOR, "1. fft(.|\n)*The op set has no such operation"),
        (lambda x: F.softmax(x, 0), VECTOR, "over the samples of the batch"),
        (lambda x: x.flip(0), VECTOR, "reverses the batch"),
        (lambda x: torch.roll(x, 1, 0), VECTOR, "moves the batch"),
        (lambda x: x.repeat(2, 1), VECTOR, "repeats the batch"),
        (lambda x: x[:, x.long()[0]], VECTOR, "indices that are computed from the input|int"),
        (lambda x: torch.cat([x, torch.arange(6.0).expand(len(x), 6)], 1), VECTOR, "is its bias"),
        (lambda x: written(x.clone(), 0), VECTOR, "single samples"),
        (lambda x: written(x.clone(), (..., slice(0, 6, 2))), VECTOR, "every other position"),
        (lambda x: x @ torch.ones(2, 8, 8), (2, 8, 8), r"no matrix \[inputs, outputs\]"),
        (lambda x: torch.ones(5, 11) @ x, VECTOR, "along the batch"),
        (lambda x: torch.einsum("nc,cd->nd", x, torch.ones(6, 2)), VECTOR, "write x @ w"),
        (lambda x: torch.linalg.vector_norm(x, -1, dim=1), IMAGE, "order is -1"),
        (lambda x: x.norm(), IMAGE, "reduces the batch"),
        (lambda x: x[:, :1].var(1), IMAGE, "variance of single values"),
        (lambda x: x.argmax(1), VECTOR, "take the argmax of the network's output"),
        (lambda x: x + torch.rand_like(x), IMAGE, "1. rand_like in Call"),
        (lambda x: x + torch.ones(300, 300), (1, 300, 300), r"there are 90,000, more than 65,536"),
        (
            lambda x: x * torch.arange(11.0)[:, None, None, None],
            IMAGE,
            "differs from sample to sample",
        ),
        (lambda x: torch.where(x > 0, x, torch.arange(8.0)), IMAGE, "differs by position"),
        (lambda x: F.avg_pool3d(x[:, None], 2), IMAGE, "1. avg_pool3d(.|\n)*Fold the depth"),
        (lambda x: x / 0, IMAGE, "divides by a constant that holds 0"),
        (lambda x: torch.atan2(x, x.mean((2, 3), keepdim=True)), IMAGE, "combines two tensors"),
        (lambda x: x[:2], IMAGE, "keep the batch as its first"),
        (lambda x: x[0], IMAGE, "single samples out of the batch"),
        (lambda x: x.mean(), IMAGE, "reduces the batch"),
        (lambda x: x.mean(0), IMAGE, "reduces the batch"),
        (lambda x: torch.stack([x, x]), IMAGE, "stacks along the batch|keep the batch"),
        (lambda x: F.pad(x, (1, 1), value=-math.inf), IMAGE, "pads with an infinity"),
        (lambda x: F.grid_sample(x, torch.zeros(11, 4, 4, 2)), IMAGE, "Resize to a fixed size"),
        (
            lambda x: F.interpolate(x, scale_factor=2.5, mode="linear"),
            (1, 2000),
            r"2,000 positions to 5,000(.|\n)*mode='nearest'(.|\n)*train again",
        ),
        (lambda x: F.adaptive_max_pool2d(x, (1, 77)), (1, 1, 150), "more than 64"),
        (lambda x: F.adaptive_avg_pool2d(x, (1, 2001)), (1, 1, 3000), "too many"),
        (lambda x: F.layer_norm(x.mean(1), (1,)), (3, 1), "normalises single values"),
        (
            lambda x: F.layer_norm(x, (3, 8, 8), torch.arange(192.0).reshape(3, 8, 8)),
            IMAGE,
            r"differs by position(.|\n)*nn.GroupNorm\(1, C\)(.|\n)*train again",
        ),
        (lambda x: x[:, :1] * torch.ones(4, 1, 1) * 2, IMAGE, "Expand the tensor first|differs by"),
        (lambda x: x.mean(1) * x, VECTOR, "one number per sample"),
        (lambda x: F.pad(x, (1, 1), value=math.nan), IMAGE, "pads with NaN"),
        (lambda x: x.transpose(0, 1).chunk(2)[1] + x, IMAGE, "moves the batch"),
        (lambda x: x.half().float(), VECTOR, "converts to torch.float16"),
        (lambda x: x.squeeze(1) @ x.squeeze(1).mT, (1, 4, 4), "matmul in Call(.|\n)*nn.Linear"),
    ],
)
def test_an_operation_without_a_place_is_refused_with_advice(f, shape, message):
    with pytest.raises(CaptureError, match=message):
        capture(Call(f), torch.zeros(2, *shape))


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda x: (x, x), "returns its input: there is nothing to capture"),
        (lambda x: {"a": x + x, "b": [3]}, r"Call returns 3 at \['b'\]\[0\], which is no tensor"),
        (lambda x: (x + x, x > 0), r"returns torch.bool at \[1\]; return float32"),
        (lambda x: (x + x, torch.ones(3) + 1), r"the output at \[1\] does not depend on the input"),
        (lambda _: None, "Call returns no tensor"),
        (lambda _: (None, []), "Call returns no tensor"),
        (lambda x: x, "returns its input: there is nothing to capture"),
        (lambda x: x.clone(), "returns its input"),
        (lambda _: torch.ones(3) + 1, "does not depend on the input"),
        (lambda x: x > 0, "returns torch.bool; return float32"),
    ],
)
def test_a_result_that_is_no_computed_tensor_is_refused(f, message):
    with pytest.raises(CaptureError, match=message):
        capture(Call(f), torch.zeros(2, 6))


@pytest.mark.parametrize("wrap", [lambda y: (y,), lambda y: [y], lambda y: {"logits": y}])
def test_a_tensor_that_stands_alone_in_a_container_is_the_output(wrap):
    network = capture(Call(lambda x: wrap(x + x)), torch.zeros(2, 6))
    assert network.ops == (Add("add", ("input", "input")),)


def test_control_flow_that_depends_on_data_is_refused_in_few_words():
    def forward(x):
        if x.sum() > 0:
            x = x + x
        return x

    with pytest.raises(CaptureError, match="control flow of Call depends on the values") as error:
        capture(Call(forward), torch.zeros(1, 4))
    text = str(error.value)
    assert "if x.sum() > 0:" in text
    assert len(text.splitlines()) == 3


def test_a_module_that_fails_is_refused_with_its_own_error_and_line():
    def forward(s, x):
        return s.fc(x)

    module = Call(forward, fc=nn.Linear(5, 3))
    with pytest.raises(CaptureError) as error:
        capture(module, torch.zeros(1, 4))
    text = str(error.value)
    assert "example's shape, [4]" in text
    assert "mat1 and mat2 shapes cannot be multiplied" in text
    assert "return s.fc(x)" in text


def test_a_module_that_takes_another_number_of_inputs_than_the_example_has_is_refused():
    class Two(nn.Module):
        def forward(self, image, mask, flag=True):
            return image + mask if flag else image

    for example in (torch.zeros(1, 4), (torch.zeros(1, 4),), (torch.zeros(1, 4),) * 4):
        count = 1 if isinstance(example, torch.Tensor) else len(example)
        reason = rf"takes 2 inputs \(image, mask\), but the example has {count}. Give a tuple"
        with pytest.raises(CaptureError, match=reason):
            capture(Two(), example)


def spoiled(name: str, value: float) -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    module.state_dict()[name].fill_(value)
    return module


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(4, 4).double(), r"weight, bias: torch.float64, not float32: call .float\(\)"),
        (nn.Linear(4, 4).half(), r"weight, bias: torch.float16, not float32"),
        (nn.Linear(4, 4, device="meta"), "weight, bias: on the meta device"),
        (nn.LazyLinear(4), "weight, bias: not initialised"),
        (spoiled("0.weight", math.nan), "  0.weight: NaN or infinite"),
        (spoiled("1.running_mean", math.inf), "  1.running_mean: NaN or infinite"),
        (
            spoiled("1.running_var", -1.0),
            "0.weight is NaN or infinite once batch norm and constants",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_parameters_that_cannot_be_are_named(module, message):
    with pytest.raises(CaptureError, match=message):
        capture(module, torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.zeros(0, 4), "at least one sample"),
        (torch.zeros(4), "at least one sample"),
        (torch.zeros(1, 4, dtype=torch.float64), "must be float32, not torch.float64"),
        (torch.zeros(1, 4, dtype=torch.uint8), "must be float32, not torch.uint8"),
        ([[0.0] * 4], "a tuple of tensors for several inputs, not a list"),
    ],
)
def test_an_example_that_is_no_float32_batch_is_refused(example, message):
    with pytest.raises(CaptureError, match=message):
        capture(nn.Linear(4, 4), example)


def test_a_thing_that_is_no_module_is_refused():
    with pytest.raises(CaptureError, match=r"takes a torch.nn.Module, not function"):
        capture(both, torch.zeros(1, 4))


def test_a_module_that_cannot_be_copied_is_refused():
    module = nn.Linear(4, 4)
    module.cache = module.weight * 2  # part of a graph, so torch refuses to copy it
    with pytest.raises(CaptureError, match="must be parameters or buffers"):
        capture(module, torch.zeros(1, 4))


def test_a_network_without_weights_is_a_network():
    network, got, expected = both(nn.Sequential(nn.AvgPool2d(2), nn.Flatten()), (3, 4, 4))
    assert kinds(network) == ["AvgPool2d", "Reshape"]
    assert dict(network.parameters) == {}
    assert torch.equal(got, expected)


def test_an_add_of_a_tensor_to_itself_reads_it_twice():
    network = capture(Call(lambda x: x + x), torch.zeros(1, 4))
    assert network.ops == (Add("add", ("input", "input")),)
