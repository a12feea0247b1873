"""Networks that nobody here wrote: are they captured, and do all engines give equal codes?

    pip install pytorchcv && python benchmarks/architectures.py resnet18 mobilenetv3_small_w1

Takes networks of the package pytorchcv by name, with random weights at their own input size, and
prints a line for each: signal-to-noise ratio of the logits against float, and per engine how many
output codes differ from the reference's. It fails if one does.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import types
from typing import Any

import numpy as np
import torch

import intact
from intact.engines import ENGINES, load_engine
from intact.errors import EngineUnavailableError, IntactError
from intact.significance import decibels

CALIBRATION, COMPARED = 4, 2
"""Images: reference is slow, and codes are many."""
NAMES = [
    *("alexnetb", "bn_vgg11", "resnet18", "resnext26_32x4d", "seresnet18", "regnetx002"),
    *("regnety002", "densenet121", "squeezenet_v1_1", "shufflenetv2_wd2", "ghostnet"),
    *("mobilenetv2_w1", "mobilenetv3_small_w1", "mnasnet_b1", "efficientnet_b0"),
    *("inceptionv3", "xception"),
]


def provider() -> Any:
    """`pytorchcv.model_provider`, which imports one thing of torchvision that we do not need."""
    if importlib.util.find_spec("torchvision") is None:
        stand_in, ops = types.ModuleType("torchvision"), types.ModuleType("torchvision.ops")
        ops.DeformConv2d = object  # type: ignore[attr-defined]
        sys.modules.update({"torchvision": stand_in, "torchvision.ops": ops})
    from pytorchcv import model_provider

    return model_provider


def examine(model: torch.nn.Module, size: int) -> tuple[str, bool]:
    """What becomes of a network in words, and whether no code differed."""
    images = torch.randn(CALIBRATION, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.train()(images)  # statistics for batch norm
        real = model.eval()(images).numpy().astype(np.float64)
    program = intact.quantize(model, [images])
    noise = program.run(images.numpy(), engine="torch") - real
    codes = program.quantize_input(images.numpy()[:COMPARED])
    reference = load_engine("reference", program)(codes)
    differing = {}
    for name in set(ENGINES) - {"auto", "reference"}:
        try:
            got = load_engine(name, program)(codes)
        except EngineUnavailableError:
            continue
        differing[name] = int((got != reference).sum())
    sqnr = decibels(float(np.square(real).sum()), float(np.square(noise).sum()))
    words = ", ".join(f"{name} {count}" for name, count in sorted(differing.items()))
    text = f"{len(program.ops)} ops, {sqnr:.1f} dB; of {reference.size:,} codes differ: {words}"
    return text, not any(differing.values())


def main() -> None:
    """Examine what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME")
    models = provider()
    equal = True
    for name in parser.parse_args().names:
        start = time.perf_counter()
        torch.manual_seed(0)
        model = models.get_model(name, pretrained=False)
        try:
            text, same = examine(model, getattr(model, "in_size", (224, 224))[0])
            equal = equal and same
        except IntactError as error:
            text = f"refused: {error}"
        print(f"{name}: {text} ({time.perf_counter() - start:.0f} s)", flush=True)
    if not equal:
        sys.exit("some engine gives other codes")


if __name__ == "__main__":
    main()
