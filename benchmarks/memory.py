"""How much memory quantizing a ResNet-50 takes, and that it does not grow with the images.

    python benchmarks/memory.py --images 32 128 512

Each count is a process of its own: random weights, random images of 3x224x224 that are made batch
by batch. It prints Markdown, and fails if a count needs more than `--limit` GiB or visibly more
than the smallest one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import children

SLACK = 1.1
"""Of peaks at different counts: allocators are not exact."""


def quantize(images: int, batch: int) -> None:
    """In a child: quantize by the default recipe."""
    from resnet50 import image_batches, random_resnet50

    import intact

    model = random_resnet50()
    children.report(lambda: intact.quantize(model, image_batches(images, batch)))


def main() -> None:
    """Measure each count, print a table, and judge it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--batch", type=int, default=16, help="images to a batch")
    parser.add_argument("--limit", type=float, default=3.0, help="GiB that none may exceed")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        quantize(args.images[0], args.batch)
        return
    print("| images | seconds | before | peak |\n|---|---|---|---|")
    peaks = []
    for count in args.images:
        arguments = ["--child", "--images", str(count), "--batch", str(args.batch)]
        outcome = children.run(Path(__file__), arguments)
        peaks.append(outcome.peak)
        before, peak = outcome.before / 2**30, outcome.peak / 2**30
        print(
            f"| {count} | {outcome.seconds:.1f} | {before:.2f} GiB | {peak:.2f} GiB |", flush=True
        )
    if max(peaks) > min(args.limit * 2**30, SLACK * peaks[0]):
        sys.exit("more memory than allowed, or memory that grows with the images")


if __name__ == "__main__":
    main()
