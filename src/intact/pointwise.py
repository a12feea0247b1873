"""Functions of one tensor, element by element: what becomes a table of all codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Pointwise", "X", "call"]


@dataclass(frozen=True, eq=False)
class Pointwise:
    """An expression in one tensor `x`, built from torch operations that work element by element.

    target     the torch operation; None for `x` itself
    arguments  of the operation: expressions, numbers, and constant tensors, which broadcast against
               a batch `[N, *sample shape]` and differ at most along its channels, axis 1
    keywords   of the operation, likewise
    label      the last function as users know it, for messages

    Called with a batch it computes what the module computes, in the batch's dtype: float32 gives
    the module's bits, float64 is what tables are built in.
    """

    target: Callable[..., Any] | None = None
    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    label: str = "x"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Float `[N, *shape]` to the same shape and dtype; differentiable."""
        result: torch.Tensor = self._value(x, {})
        return result

    def _value(self, x: torch.Tensor, known: dict[Pointwise, Any]) -> Any:
        if self.target is None:
            return x
        if self not in known:
            arguments = [_evaluate(a, x, known) for a in self.arguments]
            keywords = {key: _evaluate(a, x, known) for key, a in self.keywords.items()}
            known[self] = self.target(*arguments, **keywords)
        return known[self]

    def tabulate(
        self, values: npt.NDArray[np.float64], shape: tuple[int, ...]
    ) -> npt.NDArray[np.float64]:
        """The function of some values, float64 `[N]` to `[1 or C, N]`: a row for all channels or
        one for each.

        shape  of a sample, `[C, ...]`, against which the constants broadcast
        """
        rows = shape[0] if self.per_channel else 1
        batch = np.repeat(values[:, None], rows, axis=1).reshape(-1, rows, *[1] * (len(shape) - 1))
        results = self(torch.from_numpy(batch)).reshape(len(values), rows)
        table: npt.NDArray[np.float64] = results.T.numpy()
        return table

    @property
    def per_channel(self) -> bool:
        """Whether some constant holds more than one value, so that channels differ."""
        waiting, seen = [self], {self}  # inner functions may be shared many times over
        while waiting:
            expression = waiting.pop()
            for part in (*expression.arguments, *expression.keywords.values()):
                if isinstance(part, torch.Tensor) and part.numel() > 1:
                    return True
                if isinstance(part, Pointwise) and part not in seen:
                    seen.add(part)
                    waiting.append(part)
        return False


def _evaluate(part: Any, x: torch.Tensor, known: dict[Pointwise, Any]) -> Any:
    if isinstance(part, Pointwise):
        return part._value(x, known)
    if isinstance(part, torch.Tensor):
        return part.to(x) if part.is_floating_point() else part.to(x.device)
    return part


X = Pointwise()
"""`x` itself."""


def call(target: Any, *arguments: Any) -> Pointwise:
    """An ATen operation of expressions, numbers and constant tensors; its own name is the label."""
    return Pointwise(target, arguments, label=target.__name__.partition(".")[0])
