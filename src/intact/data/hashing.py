"""SHA-256 of samples: what shows that two runs saw the same data."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from intact.data import Labels

__all__ = ["SampleHashes"]


class SampleHashes:
    """Of all inputs that have come by, float32, and of all labels, int64, little-endian."""

    def __init__(self) -> None:
        self._inputs, self._labels = hashlib.sha256(), hashlib.sha256()
        self._labelled = False

    def update(self, x: npt.NDArray[np.float32], labels: Labels | None) -> None:
        """Take a batch in; how samples are grouped into batches does not matter."""
        self._inputs.update(np.ascontiguousarray(x, dtype="<f4").data)
        if labels is not None:
            self._labelled = True
            self._labels.update(np.ascontiguousarray(labels, dtype="<i8").data)

    @property
    def inputs(self) -> str:
        """In hex."""
        return self._inputs.hexdigest()

    @property
    def labels(self) -> str | None:
        """In hex; None where there were none."""
        return self._labels.hexdigest() if self._labelled else None
