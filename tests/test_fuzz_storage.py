"""Whatever is done to a file, loading it gives a program that runs, or an `IntactError`."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intact.arithmetic import QParams
from intact.engines import load_engine
from intact.errors import IntactError
from intact.ops import Linear
from intact.program import Program
from intact.signature import wrapped
from intact.storage import from_bytes, load, to_bytes
from sealed import seal, unpack
from strategies import Builder, example, input_codes, programs

DATA = to_bytes(example())


def tiny() -> bytes:
    """The file of one linear layer: small enough to damage every byte of it in every way."""
    b = Builder.start((3,), QParams((0.5,)))
    b.weighted(Linear("fc", ("x",)), np.array([[1, -2, 3]], np.int8), QParams((0.25,)))
    return to_bytes(b.finish())


def refused(data: bytes) -> bool:
    try:
        from_bytes(data)
    except IntactError:
        return True
    return False


# -- damage: the digest finds all of it ----------------------------------------------------------


def test_every_single_flipped_bit_is_found():
    data = bytearray(tiny())
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        assert refused(bytes(data)), f"bit {bit % 8} of byte {bit // 8} can flip unnoticed"
        data[bit // 8] ^= 1 << bit % 8
    assert not refused(bytes(data))


@pytest.mark.slow
def test_every_value_of_every_byte_but_the_right_one_is_found():
    data = bytearray(DATA)
    for i, right in enumerate(DATA):
        for wrong in set(range(256)) - {right}:
            data[i] = wrong
            assert refused(bytes(data)), f"byte {i} can be {wrong} instead of {right}"
        data[i] = right


def test_every_truncation_is_found():
    assert all(refused(DATA[:length]) for length in range(len(DATA)))


def test_every_missing_byte_and_every_missing_start_is_found():
    assert all(refused(DATA[:i] + DATA[i + 1 :]) for i in range(len(DATA)))
    assert all(refused(DATA[i:]) for i in range(1, len(DATA)))


@given(st.binary(max_size=300), st.booleans())
def test_arbitrary_bytes_are_refused(data, with_length):
    prefix = len(data).to_bytes(8, "little") if with_length else b""
    assert refused(prefix + data)


def test_damage_on_the_disk_names_the_file(tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(DATA[:-9])
    with pytest.raises(IntactError, match=r"net\.safetensors is damaged or cut short"):
        load(path)


# -- malice: the digest is right, whatever the content -------------------------------------------

NUMBERS = [0, 1, -1, 2, 3, 7, 128, 255, 256, 65_536, 2**28, 2**31 - 1, 2**31, 2**63, 10**4000]
ODDITIES = [None, True, 0.0, 0.5, 1e-45, 1e300, "", "x", "fc", "\0", "\n", "é" * 999, [], {}]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values within nested lists and dictionaries."""
    found = [path] if path else []
    keys: Any = sorted(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        inner = value[key]
        found += places(inner, (*path, key)) if isinstance(inner, dict | list) else [(*path, key)]
    return found


@st.composite
def mutated_structures(draw: Any, structure: dict[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(structure)
    for _ in range(draw(st.integers(0, 2))):
        path = draw(st.sampled_from(places(result)))
        parent = result
        for key in path[:-1]:
            parent = parent[key]
        old = parent[path[-1]]
        action = draw(st.sampled_from(["near", "near", "number", "odd", "delete", "add", "copy"]))
        if action == "delete":
            del parent[path[-1]]
        elif action == "add" and isinstance(old, list):
            old.append(copy.deepcopy(old[0]) if old else 1)
        elif action == "add" and isinstance(old, dict):
            old[draw(st.sampled_from(["name", "axis", "new"]))] = draw(st.sampled_from(ODDITIES))
        elif action == "copy":
            source: Any = result
            for key in draw(st.sampled_from(places(result))):
                source = source[key]
            parent[path[-1]] = copy.deepcopy(source)
        elif action == "near" and type(old) is int:
            parent[path[-1]] = old + draw(st.sampled_from([-2, -1, 1, 2]))
        elif action == "near" and type(old) is float:
            parent[path[-1]] = old * draw(st.sampled_from([2.0, 0.5, 1 + 1e-9, 2.0**100, -1.0]))
        elif action == "odd":
            parent[path[-1]] = copy.deepcopy(draw(st.sampled_from(ODDITIES)))
        else:
            parent[path[-1]] = draw(st.sampled_from(NUMBERS))
    return result


@st.composite
def mutated_arrays(draw: Any, arrays: dict[str, Any]) -> dict[str, Any]:
    result = dict(arrays)
    if not result or draw(st.booleans()):
        return result
    name = draw(st.sampled_from(sorted(result)))
    array = result[name]
    action = draw(st.sampled_from(["value", "value", "type", "shape", "cut", "drop", "rename"]))
    if action == "value":
        array = array.copy()
        bits = array.view(np.uint8).reshape(-1)
        for at in draw(st.lists(st.integers(0, bits.size - 1), min_size=1, max_size=4)):
            bits[at] = draw(st.sampled_from([0, 1, 127, 128, 255]))
        result[name] = array
    elif action == "type":
        dtypes = [np.int8, np.uint8, np.int32, np.int64, np.float16, np.float32]
        with np.errstate(all="ignore"):
            result[name] = array.astype(draw(st.sampled_from(dtypes)))
    elif action == "shape":
        shapes = [(array.size,), (1, array.size), array.shape[::-1], (*array.shape, 1)]
        result[name] = array.reshape(draw(st.sampled_from(shapes)))
    elif action == "cut":
        result[name] = array[draw(st.integers(0, 1)) : -1]
    else:
        del result[name]
        if action == "rename":
            new = st.sampled_from(["x", "x.bias", name[:-1], "\0", name.replace("multi", "")])
            result[draw(new)] = array
    return result


def small(program: Program) -> bool:
    """Whether it runs in milliseconds: mutation may pad a pixel to a legal 100 MB."""
    pads = [sum(getattr(op, "padding", ())) for op in program.ops]
    size = sum(math.prod(tensor.shape) for tensor in program.tensors.values())
    return size < 10**5 and max(pads) < 100


def loads_and_runs_or_is_refused(data: Any, file: bytes) -> bool:
    try:
        loaded = from_bytes(file, "f")
    except IntactError as error:
        message = str(error)
        assert message.startswith("f ")
        assert len(message) < 2000
        assert message.isprintable()
        return False
    assert to_bytes(loaded) == file
    repr(loaded)
    if small(loaded):
        codes = data.draw(input_codes(loaded))
        n = len(wrapped(codes, loaded.inputs)[0])
        results = wrapped(load_engine("reference", loaded)(codes), loaded.outputs)
        for name, result in zip(loaded.outputs, results, strict=True):
            spec = loaded.tensors[name]
            assert result.shape == (n, *spec.shape)
            assert result.dtype == spec.qparams.dtype
            if result.size:
                assert spec.qparams.qmin <= result.min()
                assert result.max() <= spec.qparams.qmax
        real = wrapped(loaded.run(codes, engine="reference"), loaded.outputs)
        assert all(np.isfinite(array).all() for array in real)
    return True


@given(st.data())
@settings(max_examples=400)
def test_a_changed_program_is_refused_or_runs(data):
    structure, arrays = unpack(DATA)
    file = seal(data.draw(mutated_structures(structure)), data.draw(mutated_arrays(arrays)))
    loads_and_runs_or_is_refused(data, file)


@given(st.data())
@settings(max_examples=100)
def test_any_changed_program_is_refused_or_runs(data):
    structure, arrays = unpack(to_bytes(data.draw(programs(max_ops=3, several=True))))
    file = seal(data.draw(mutated_structures(structure)), data.draw(mutated_arrays(arrays)))
    loads_and_runs_or_is_refused(data, file)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=5_000)
def test_any_changed_program_is_refused_or_runs_at_length(data):
    structure, arrays = unpack(to_bytes(data.draw(programs(max_ops=4, several=True))))
    file = seal(data.draw(mutated_structures(structure)), data.draw(mutated_arrays(arrays)))
    loads_and_runs_or_is_refused(data, file)


def test_the_fuzzer_reaches_both_outcomes():
    # One that refuses everything, or mutates nothing, would prove nothing.
    outcomes = set()

    @given(st.data())
    @settings(max_examples=200, database=None, derandomize=True)
    def collect(data):
        structure, arrays = unpack(DATA)
        structure = data.draw(mutated_structures(structure))
        changed = seal(structure, data.draw(mutated_arrays(arrays)))
        outcomes.add((changed == DATA, loads_and_runs_or_is_refused(data, changed)))

    collect()
    assert outcomes == {(True, True), (False, True), (False, False)}
