"""What goes into a network and comes out of it: named tensors in order, and what stands for them.

Networks, programs and engines have one convention. Where there is one input, its value stands
alone; where there are several, their values are a tuple in the order of their names, or a mapping
from names. Results likewise: the only one alone, several as a tuple in the order of the outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from intact.errors import IntactError
from intact.ops import Op

__all__ = ["Values", "in_order", "listed", "signature_error", "the_only", "unwrapped", "wrapped"]

Values: TypeAlias = Any
"""The value of the only input or output, or a tuple of the values of all. How many there are is
known when it runs, not to a type checker, and callers know which of the two they have."""


def unwrapped(values: Iterable[Any]) -> Values:
    """The only value itself, or several as a tuple."""
    all_values = tuple(values)
    return all_values[0] if len(all_values) == 1 else all_values


def wrapped(values: Values, names: Sequence[str]) -> tuple[Any, ...]:
    """The values of all these names, of which `unwrapped` made `values`."""
    return (values,) if len(names) == 1 else tuple(values)


def in_order(
    given: Any, names: Sequence[str], whose: str, error: type[IntactError]
) -> tuple[Any, ...]:
    """What a caller gives for each input, in the order of `names`.

    given   for several inputs a tuple or list of as many values, or a mapping from all names; for
            one input its value, whatever that is, or a mapping from its name
    whose   "program" or "network", for messages
    error   what is raised where values are missing or left over
    """
    if isinstance(given, Mapping):
        if unknown := sorted(str(name) for name in given if name not in names):
            raise error(f"the {whose} has no input {unknown[0]!r}; it has {listed(names)}.")
        if missing := [name for name in names if name not in given]:
            raise error(f"there is nothing for the {whose}'s input {listed(missing)}.")
        return tuple(given[name] for name in names)
    if len(names) == 1:
        return (given,)
    if not isinstance(given, tuple | list) or len(given) != len(names):
        what = f"{len(given)}" if isinstance(given, tuple | list) else f"a {type(given).__name__}"
        raise error(
            f"the {whose} has {len(names)} inputs, {listed(names)}: give a tuple of as many "
            f"batches in this order, or a mapping from these names, not {what}."
        )
    return tuple(given)


def the_only(kind: str, names: Sequence[str], whose: str, error: type[IntactError]) -> str:
    """The only name; raises `error` where there are several, for what works with one only.

    kind, whose  "input" or "output", of a "program" or "network", for the message
    """
    if len(names) != 1:
        raise error(
            f"the {whose} has {len(names)} {kind}s, {listed(names)}; this works with one {kind} "
            "only."
        )
    return names[0]


def signature_error(inputs: Sequence[str], outputs: Sequence[str], ops: Iterable[Op]) -> str | None:
    """What is wrong with the inputs and outputs of these ops, or None.

    Every input is read by an op: engines leave out what nothing depends on, and then disagree
    about how many inputs there are. Every output is the result of an op, and given out once.
    """
    if not inputs or not outputs:
        return "there must be at least one input and one output"
    ops = tuple(ops)
    made, read = {op.name for op in ops}, {tensor for op in ops for tensor in op.inputs}
    for name in inputs:
        if name not in read:
            return f"the input {name!r} is read by no op"
    for i, name in enumerate(outputs):
        if name not in made:
            return f"the output {name!r} is computed by no op"
        if name in outputs[:i]:
            return f"the output {name!r} is given out twice"
    return None


def listed(names: Sequence[str]) -> str:
    """Names for a message: `'a'`, `'a' and 'b'`, `'a', 'b' and 'c'`."""
    shown = [repr(name) for name in names]
    return " and ".join([*([", ".join(shown[:-1])] if shown[1:] else []), *shown[-1:]])
