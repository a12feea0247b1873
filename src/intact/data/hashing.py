"""SHA-256 of samples: what shows that two runs saw the same data."""

from __future__ import annotations

import hashlib

import numpy as np

from intact.data import Labels
from intact.signature import Values

__all__ = ["SampleHashes"]


class SampleHashes:
    """Of all inputs that have come by, float32, and of all labels, int64, little-endian."""

    def __init__(self) -> None:
        self._inputs: list[hashlib._Hash] = []
        self._labels = hashlib.sha256()
        self._labelled = False

    def update(self, x: Values, labels: Labels | None) -> None:
        """Take a batch in; how samples are grouped into batches does not matter.

        x  float32 `[n, ...]`; of several inputs a tuple of such arrays
        """
        parts = x if isinstance(x, tuple) else (x,)
        self._inputs = self._inputs or [hashlib.sha256() for _ in parts]
        for digest, part in zip(self._inputs, parts, strict=True):
            digest.update(np.ascontiguousarray(part, dtype="<f4").data)
        if labels is not None:
            self._labelled = True
            self._labels.update(np.ascontiguousarray(labels, dtype="<i8").data)

    @property
    def inputs(self) -> str:
        """In hex. Of several inputs, the hash of the hashes of each, 32 bytes, in their order."""
        if len(self._inputs) == 1:
            return self._inputs[0].hexdigest()
        return hashlib.sha256(b"".join(each.digest() for each in self._inputs)).hexdigest()

    @property
    def labels(self) -> str | None:
        """In hex; None where there were none."""
        return self._labels.hexdigest() if self._labelled else None
