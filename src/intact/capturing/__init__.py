"""`capture`: a trained float module becomes a `Network`.

`torch.export` yields a graph of ATen operations, in which in-place writes are already resolved.
Each is canonicalised to the op set of `intact.ops`:

| in the module | in the `Network` |
|---|---|
| `conv2d`, any stride, padding (numbers, "same", "valid"), dilation, groups | `Conv2d` |
| `conv1d`, and pools over a line | as over an image of one row, between two `Reshape` |
| `conv_transpose2d`, `conv_transpose1d` | `Conv2d` with a channel per phase, then `Reshape`, \
`Permute`, `Slice` |
| `linear` | `Linear` |
| batch norm, and factors and offsets by channel | folded into the `Conv2d` or `Linear` whose \
result nobody else reads; else a depthwise 1x1 `Conv2d` |
| a constant factor or offset | folded likewise; else part of a `Table` |
| factors and offsets by position | a depthwise 1x1 `Conv2d` over positions as channels |
| `relu`, `relu6`, `hardtanh`, `clamp`, `clip` after an op with a grid of its own or a sum, whose \
result nobody else reads | `low`, `high` of that op's `TensorSpec` |
| any other clamp | `Clamp`; a clamp of a clamp is one clamp |
| layer, group, instance and RMS norm | averages, `Subtract`, `Table`, `Multiply`: `norms.py` |
| `softmax`, `log_softmax` over any axis | the same, after the maximum: `softmax.py` |
| `norm`, `var` over any axes | the same |
| `x @ w`, `w @ x` with a constant matrix, `addmm` | `Linear`, for `w @ x` between two `Permute` |
| any other function of one tensor, and chains of them, `x * sigmoid(x)` too | one `Table` |
| `x + y`, `x - y`, `x * y`, `x / y` | `Add`, `Subtract`, `Multiply`, by a `Table` of reciprocals; \
what is broadcast goes through `Upsample`, but for the second factor of a product |
| `max_pool2d` | `MaxPool2d`; ceil mode as more padding below and on the right |
| `avg_pool2d` that divides by the kernel's size | `AvgPool2d` |
| `adaptive_avg_pool2d` to 1x1, `mean` over any axes | `GlobalAvgPool`, `Reshape` |
| `avg_pool3d` over one axis, as in local response norm | `AvgPool2d` |
| adaptive pools to a size that divides the input's | `AvgPool2d`, `MaxPool2d` |
| average pools whose windows differ in size | `Linear` over all positions: one row per window; \
over columns and rows, one after the other, where that would be large |
| max pools whose windows differ in size | `Slice`, `MaxPool2d`, `Concat` |
| `amax`, `max`, `amin`, `min` over any axes | `MaxPool2d`; between two `Table` for a minimum |
| `maximum`, `minimum` of two tensors | `Concat`, `MaxPool2d`; likewise |
| `cat`, `stack` | `Concat`; constants of one value as `Pad` |
| `split`, `chunk`, `unbind`, `narrow`, `select`, indexing with ranges | `Slice` |
| padding with own values (reflect, replicate, circular), `flip`, `roll`, `repeat`, constant \
indices, and what is written into a part of a tensor | `Slice`, `Upsample`, `Concat` |
| constant padding | part of the convolution or pool that reads it; else `Pad` |
| nearest upsampling by whole factors, `expand` | `Upsample` |
| any other resizing: `nearest`, `bilinear`, `bicubic`, antialiased | `Linear` over each axis |
| `flatten`, `view`, `reshape`, `squeeze`, `unsqueeze` | `Reshape` |
| `permute`, `transpose` | `Permute` |
| `pixel_shuffle`, `channel_shuffle` | `Reshape`, `Permute`, `Reshape` |
| dropout, `contiguous`, `clone`, `detach`, a reshape to the same shape, `x + 0` | nothing |
| whatever is computed from parameters alone (weight norm, ...) | its value |
| what torch composes of these (`glu`, `addcmul`, `normalize`, `hstack`, ...) | its parts |
| anything else | one `CaptureError` that lists every offender |

The network computes what the module computes in eval mode, bit for bit, but for what is within
float rounding: batch norm and constants that are folded, norms by the sample's own statistics,
softmax, variances, quotients of tensors, what torch composes, transposed convolutions, sums over
axes, and average pools whose windows differ in size or have an area that is no power of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.fx import Node

from intact.capturing import (  # noqa: F401  (register)
    elementwise,
    layers,
    moving,
    norms,
    pooling,
    softmax,
)
from intact.capturing.building import (
    Builder,
    Refusal,
    function_name,
    operation_name,
    stays_whole,
)
from intact.capturing.exporting import export
from intact.errors import CaptureError
from intact.network import Network
from intact.signature import Values

__all__ = ["Refusal", "Survey", "capture", "survey"]

SUPPORTED = (
    "convolutions (1-D, 2-D, transposed), linear, x @ w with a constant w; batch, layer, group, "
    "instance and RMS norm, softmax; any function of one tensor (relu, sigmoid, silu, gelu, "
    "hardswish, prelu, ...); sums, differences, products, quotients, maxima and minima of tensors; "
    "max, average and adaptive pools, means, norms; cat, stack, split, chunk, slices, constant "
    "indices; flatten, reshape, permute, flip, roll, repeat, shuffles; padding, resizing; dropout"
)

_FAMILIES = {
    "baddbmm einsum": "It multiplies matrices. By a constant one write x @ w, with x.permute(...) "
    "around it; two that both depend on the input have no product: use nn.Linear or nn.Conv2d, and "
    "train again.",
    "gru lstm rnn": "Write its steps out: linear layers, sigmoid, tanh and products of tensors "
    "are there, and compute the same.",
    "conv3d max_pool3d": "It works over three axes. Fold the depth into the channels, use two "
    "axes, and train again.",
    "argmin argsort sort topk": "Leave it out, and compute it from the network's output.",
    "bernoulli fractional_max_pool2d rand rand_like randint randn randn_like rrelu": "It draws "
    "random numbers. Leave it out in eval mode: if self.training.",
    "grid_sample affine_grid": "Resize to a fixed size with nn.functional.interpolate, "
    "and train again.",
}
_HINTS: Mapping[str, str] = {
    **{name: hint for names, hint in _FAMILIES.items() for name in names.split()},
    "argmax": "Leave it out, and take the argmax of the network's output.",
    "batch_norm": "It normalises by the statistics of the batch at hand, so a result would depend "
    "on what else is in the batch. Use track_running_stats=True, and train again.",
    "mean": "It reduces the batch, too. Name the axes, without the first one: x.mean((2, 3)).",
    "dropout": "It drops in eval mode too; pass training=self.training.",
    "scaled_dot_product_attention": "Attention multiplies matrices that both depend on the input. "
    "Take a convolutional network.",
}


_OTHERWISE = (
    "The op set has no such operation. Build it from those that docs/guide.md lists, or compute it "
    "outside of the network."
)


@dataclass(frozen=True, slots=True)
class Survey:
    """What would become of a module.

    network   None where something is refused
    refusals  every operation that has no place in a network, in the order of execution
    """

    network: Network | None
    refusals: tuple[Refusal, ...]


def survey(module: nn.Module, example: Values) -> Survey:
    """As `capture`, but operations that are not covered are listed instead of raised.

    What cannot be exported at all raises `CaptureError` here too.
    """
    evaluated, exported = export(module, example, _whole)
    return Survey(*Builder(evaluated, exported, _hint).build())


def capture(module: nn.Module, example: Values) -> Network:
    """The module as a `Network`: what it computes in eval mode, with its present parameters.

    module   takes float32 batches and returns tensors, one or in tuples, lists and dictionaries,
             nested or not; all have the batch as first axis. It may be in training mode and on any
             device; it is not changed, a copy is captured
    example  float32 `[N, ...]` with N >= 1; only the shape of its first sample matters. For several
             inputs a tuple or list of such tensors in the order of `forward`'s parameters, or a
             mapping from the parameters' names
    returns  a network on the CPU whose parameters are detached copies. An op is named after the
             module that holds it (`layer1.0.conv2`), or after the function and the enclosing module
             (`layer1.0.add`); repeated names get `_1`, `_2`. One input is `input`; several have the
             names of `forward`'s parameters. Outputs stand in the order in which the module returns
             them, None left out; `Network.returned` says where

    Raises `CaptureError` that lists every operation the op set does not cover, each with its layer,
    the user's source line and what to do.
    """
    found = survey(module, example)
    if found.network is None:
        raise CaptureError(_message(type(module).__name__, found.refusals))
    return found.network


def _message(name: str, refusals: tuple[Refusal, ...]) -> str:
    count = len(refusals)
    lines = [f"{count} operation{'s' * (count > 1)} of {name} cannot be captured:"]
    for i, refusal in enumerate(refusals, 1):
        lines += ["", f"{i}. {refusal.function} in {refusal.layer}"]
        lines += [f"   {refusal.source}"] if refusal.source else []
        lines += [f"   {refusal.reason}"]
    return "\n".join([*lines, "", f"Supported: {SUPPORTED}."])


def _whole(target: object) -> bool:
    """Whether an operation is not decomposed: it has a converter, or a refusal of its own, which
    says more than those of its parts.
    """
    return stays_whole(target) or operation_name(target) in _HINTS


def _hint(node: Node) -> str:
    return _HINTS.get(function_name(node), _OTHERWISE)
