"""What another generation of JPEG costs: CIFAR-10, re-encoded at quality 75, to train on.

    python benchmarks/jpeg.py FOLDER OUT
    intact train resnet8 --epochs 8 --data-dir FOLDER -o once.safetensors
    intact train resnet8 --epochs 8 --data-dir OUT -o twice.safetensors

FOLDER holds CIFAR-10's binary files, or the folder `cifar-10-batches-bin` that does; OUT gets the
same labels with other pixels. The grid of blocks lies 4 pixels off the images' own, or else
pixels that were JPEG before would hardly change. Chroma is halved in both directions, as encoders
do by default.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

QUALITY = 75
MARGIN = 4
SIDE = 32
INNER = slice(MARGIN, MARGIN + SIDE)


def encoded(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """An image `[3, 32, 32]` after JPEG."""
    padded = np.pad(pixels, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)), mode="reflect")
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(padded.transpose(1, 2, 0))).save(
        file, "JPEG", quality=QUALITY
    )
    return np.asarray(Image.open(file))[INNER, INNER].transpose(2, 0, 1)


def main() -> None:
    """Re-encode every file, and say how far the pixels moved."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT")
    args = parser.parse_args()
    source = args.folder / "cifar-10-batches-bin"
    source = source if source.is_dir() else args.folder
    out = args.out / "cifar-10-batches-bin"
    out.mkdir(parents=True)
    shutil.copy(source / "batches.meta.txt", out)
    errors = []
    for file in sorted(source.glob("*.bin")):
        records = np.fromfile(file, np.uint8).reshape(-1, 1 + 3 * SIDE * SIDE)
        images = records[:, 1:].reshape(-1, 3, SIDE, SIDE)
        again = np.stack([encoded(image) for image in images])
        errors.append(np.square(again.astype(np.float64) - images).mean())
        (out / file.name).write_bytes(
            np.concatenate([records[:, :1], again.reshape(len(again), -1)], axis=1).tobytes()
        )
    print(f"{10 * np.log10(255**2 / np.mean(errors)):.1f} dB peak signal-to-noise ratio")


if __name__ == "__main__":
    main()
