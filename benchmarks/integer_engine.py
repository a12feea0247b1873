"""The integer LeNet on the torch engine against the float LeNet in torch: time ratios.

Both evaluate the same images in the same batches, interleaved in one process; a ratio is taken
within each round, and the median over the rounds is reported with its quartiles. The float network
is measured as a user would run it: the nn.Module in eval mode under inference_mode, from a float
tensor to logits. The integer program is measured from the float images to output codes, input
quantization included, and from codes to codes.

    python benchmarks/integer_engine.py [--batch 500] [--images 5000] [--rounds 15] [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

import intact
from intact.data import load_dataset, to_input
from intact.engines.torch import TorchEngine
from intact.zoo import load_lenet


def main() -> None:
    """Measure, and print one line per contestant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model = load_lenet("cifar10", "last")
    rng = np.random.default_rng(0)
    # Timing does not depend on what the pictures show: the digits stand in for CIFAR-10.
    pixels = load_dataset("digits").train_images
    pixels = pixels[rng.integers(0, len(pixels), args.images)]
    images = torch.from_numpy(to_input(pixels))
    batches = images.split(args.batch)
    program = intact.quantize(model, batches[:2])
    engine = TorchEngine(program)
    codes = [program.quantize_input(batch.numpy()) for batch in batches]

    def floating() -> None:
        with torch.inference_mode():
            for batch in batches:
                model(batch)

    def from_floats() -> None:
        for batch in batches:
            engine(program.quantize_input(batch.numpy()))

    def from_codes() -> None:
        for batch in codes:
            engine(batch)

    contestants = {"float": floating, "integer": from_floats, "integer, from codes": from_codes}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(args.rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    print(
        f"LeNet, {args.images} images in batches of {args.batch}, {args.threads} thread(s), "
        f"{args.rounds} rounds, torch {torch.__version__}"
    )
    base = times["float"][1:]  # the first round warms up
    for name, all_times in times.items():
        measured = all_times[1:]
        ratios = [t / b for t, b in zip(measured, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{name:20s} {1e6 * statistics.median(measured) / args.images:8.1f} µs per image   "
            f"{middle:.2f} of float (quartiles {low:.2f} to {high:.2f})"
        )


if __name__ == "__main__":
    main()
