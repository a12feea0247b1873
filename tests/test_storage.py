from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from intact import storage
from intact.errors import IntactError, ProgramError, StorageError
from intact.program import Program
from intact.storage import from_bytes, load, save, to_bytes, write_atomically
from sealed import ZEROS, seal, sign, unpack
from strategies import example, programs

PROGRAM = example()
DATA = to_bytes(PROGRAM)


def refusal(data: bytes) -> str:
    with pytest.raises(IntactError) as caught:
        from_bytes(data, "lenet.safetensors")
    assert str(caught.value).startswith("lenet.safetensors ")
    return str(caught.value)


def changed(edit) -> bytes:
    """The example's file after `edit(structure, arrays)`, with a right digest."""
    structure, arrays = unpack(DATA)
    edit(structure, arrays)
    return seal(structure, arrays)


# -- round trip ----------------------------------------------------------------------------------


@given(programs())
@settings(max_examples=60)
def test_a_program_survives_its_file(program):
    data = to_bytes(program)
    loaded = from_bytes(data)
    assert loaded == program
    assert to_bytes(loaded) == data
    assert (loaded.inputs, loaded.outputs) == (program.inputs, program.outputs)
    assert loaded.ops == program.ops
    assert loaded.tensors == program.tensors
    assert loaded.info == program.info
    assert set(loaded.parameters) == set(program.parameters)
    for name, array in program.parameters.items():
        assert loaded.parameters[name].dtype == array.dtype
        assert loaded.parameters[name].dtype.isnative
        assert np.array_equal(loaded.parameters[name], array)


def test_the_safetensors_library_reads_the_file(tmp_path):
    save(PROGRAM, tmp_path / "p.safetensors")
    with safe_open(tmp_path / "p.safetensors", "np") as file:
        assert json.loads(file.metadata()["intact"])["format"] == 2
        assert set(file.keys()) == set(PROGRAM.parameters)
    for name, array in load_tensors(DATA).items():
        assert array.dtype == PROGRAM.parameters[name].dtype
        assert np.array_equal(array, PROGRAM.parameters[name])


def test_a_file_sealed_independently_is_the_same_file():
    assert seal(*unpack(DATA)) == DATA


def test_the_digest_is_that_of_the_file_with_its_digits_set_to_zero():
    digest = unpack(DATA)[0]["digest"]
    assert DATA.count(digest.encode()) == 1
    assert hashlib.sha256(DATA.replace(digest.encode(), ZEROS.encode())).hexdigest() == digest


def test_equal_programs_give_equal_bytes_in_any_process():
    code = (
        "import hashlib, strategies; from intact.storage import to_bytes;"
        "print(hashlib.sha256(to_bytes(strategies.example())).hexdigest())"
    )
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests.parent / "src"), str(tests)])
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
        assert run.stdout.decode().strip() == PROGRAM.sha256


def test_the_order_of_dictionaries_does_not_reach_the_file():
    turned = Program(
        PROGRAM.inputs,
        PROGRAM.outputs,
        PROGRAM.ops,
        dict(reversed(PROGRAM.tensors.items())),
        dict(reversed(PROGRAM.parameters.items())),
        PROGRAM.info,
    )
    assert to_bytes(turned) == DATA


def test_the_format_is_frozen():
    # A change here makes every stored file foreign: raise FORMAT and keep reading the old one.
    structure, _ = unpack(DATA)
    assert sorted(structure) == ["digest", "format", "info", "inputs", "ops", "outputs", "tensors"]
    assert structure["ops"][1] == {
        "op": "MaxPool2d",
        "name": "pool1",
        "inputs": ["conv1"],
        "kernel": [2, 2],
        "stride": [2, 2],
        "padding": [0, 0, 0, 0],
        "dilation": [1, 1],
    }
    assert structure["tensors"]["x"] == {
        "shape": [2, 5, 5],
        "qparams": {
            "scale": [0.0078125],
            "zero_point": 0,
            "qmin": -128,
            "qmax": 127,
            "bits": 8,
            "signed": True,
            "axis": None,
        },
    }


# -- damaged files -------------------------------------------------------------------------------


def test_an_empty_file_is_refused():
    assert "0 bytes" in refusal(b"")


def test_every_kind_of_truncation_says_so():
    assert "cut short" in refusal(DATA[:-1])
    assert "cut short" in refusal(DATA[:500])
    assert "Was it written completely?" in refusal(DATA[:7])


def test_a_flipped_bit_in_a_weight_is_found_by_the_digest():
    flipped = bytearray(DATA)
    flipped[-1] ^= 1
    message = refusal(bytes(flipped))
    assert "is damaged" in message
    assert "Copy it again" in message


def test_bytes_after_the_end_are_found():
    assert "is damaged" in refusal(DATA + b"\0")


def test_a_header_that_announces_terabytes_is_refused_without_allocating():
    assert "1,099,511,627,776" in refusal(struct.pack("<Q", 2**40) + DATA[8:])
    assert "no program" in refusal(b"\xff" * 64)


def test_other_files_are_told_apart():
    weights = save_tensors({"conv1.weight": np.ones((2, 2), np.float32)})
    assert "may be a float network's weights" in refusal(weights)
    tagged = save_tensors({"w": np.ones(2, np.float32)}, {"format": "pt"})
    assert "may be a float network's weights" in refusal(tagged)
    assert "no safetensors file" in refusal(struct.pack("<Q", 8) + b"garbage!" + b"x" * 99)
    assert "no safetensors file" in refusal(struct.pack("<Q", 50_000) + b"[" * 50_000)
    foreign = save_tensors({"w": np.ones(2, np.float32)}, {"intact": "1"})
    assert "another tool" in refusal(foreign)


def test_a_pickle_is_not_opened():
    evil = b"cos\nsystem\n(S'echo evil'\ntR."
    assert "no program" in refusal(evil.ljust(200, b"."))


# -- files that were made wrong, with a right digest ---------------------------------------------


def test_a_foreign_version_is_named_with_the_supported_one():
    message = refusal(changed(lambda s, _: s.update(format=1)))
    assert "format 1" in message
    assert "reads format 2" in message
    refusal(changed(lambda s, _: s.update(format=True)))
    refusal(changed(lambda s, _: s.update(format=1.0)))


def test_unknown_and_missing_fields_are_refused():
    assert "'writer'" in refusal(changed(lambda s, _: s.update(writer="me")))
    assert "'info'" in refusal(changed(lambda s, _: s.pop("info")))
    assert "no field 'rate'" in refusal(changed(lambda s, _: s["ops"][0].update(rate=2)))
    assert "'stride' is missing" in refusal(changed(lambda s, _: s["ops"][0].pop("stride")))
    assert "no field 'z'" in refusal(changed(lambda s, _: s["tensors"]["x"].update(z=1)))
    message = refusal(changed(lambda s, _: s["tensors"]["x"]["qparams"].pop("axis")))
    assert "tensor 'x': the field 'axis' is missing" in message


def test_an_unknown_op_is_refused_with_the_known_ones():
    message = refusal(changed(lambda s, _: s["ops"][1].update(op="Softmax")))
    assert "'Softmax'" in message
    assert "MaxPool2d" in message
    refusal(changed(lambda s, _: s["ops"][1].update(op=["MaxPool2d"])))
    refusal(changed(lambda s, _: s["ops"][1].pop("op")))


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [1], {}, 2**31, -(2**63)])
def test_a_field_of_a_wrong_type_is_refused(value):
    assert "groups is " in refusal(changed(lambda s, _: s["ops"][0].update(groups=value)))
    assert "stride is " in refusal(changed(lambda s, _: s["ops"][0].update(stride=[value, 1])))
    refusal(changed(lambda s, _: s["tensors"]["x"].update(shape=[2, value, 5])))
    for name in ("zero_point", "qmin", "qmax", "bits"):
        edit = {name: value}
        refusal(changed(lambda s, _, edit=edit: s["tensors"]["x"]["qparams"].update(edit)))


@pytest.mark.parametrize("value", [[1], [], [True], ["1.0"], [1.0, 1.0], 1.0, [0.1], [0.0], [-1.0]])
def test_a_scale_that_is_no_float32_is_refused(value):
    refusal(changed(lambda s, _: s["tensors"]["x"]["qparams"].update(scale=value)))


@pytest.mark.parametrize("field", ["info", "ops", "tensors", "inputs", "outputs", "format"])
@pytest.mark.parametrize("value", [None, 1, True, "x", [], [[]], {}, {"x": 1}, ["x"], 0.5])
def test_parts_of_a_wrong_type_are_refused(field, value):
    data = changed(lambda s, _: s.update({field: value}))
    if (field, value) == ("info", {}) or data == DATA:
        assert to_bytes(from_bytes(data)) == data
    else:
        refusal(data)


def test_nan_and_infinity_are_no_json():
    text = json.dumps({**unpack(DATA)[0], "digest": ZEROS}, sort_keys=True, separators=(",", ":"))
    for literal in ("NaN", "Infinity", "-Infinity"):
        data = seal(text.replace("0.0078125", literal), unpack(DATA)[1])
        assert f"{literal} is no JSON" in refusal(data)
    assert "finite" in refusal(seal(text.replace("0.0078125", "1e999"), unpack(DATA)[1]))


def test_duplicate_keys_are_refused():
    structure, arrays = unpack(DATA)
    text = json.dumps({**structure, "digest": ZEROS}, sort_keys=True, separators=(",", ":"))
    twice = text.replace('"outputs":["fc"]', '"outputs":["fc"],"outputs":["fc"]')
    assert "'outputs' stands there twice" in refusal(seal(twice, arrays))


def test_hostile_json_is_refused_in_bounded_time():
    text = '{"digest":"' + ZEROS + '","format":'
    for rest, reason in [
        ("[" * 200_000, "nested too deeply"),
        ("1" * 15_000_000 + "}", "an integer of 15,000,000 digits"),
        ("-" + "1" * 20 + "}", "an integer of 21 digits"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("1", "JSON is invalid"),
        ('2,"ops":[' + "0," * 10**6 + "0]}", "lacks"),
    ]:
        assert reason in refusal(seal(text + rest, {}))


def test_a_file_in_another_form_is_refused():
    structure, arrays = unpack(DATA)
    spaced = json.dumps({**structure, "digest": ZEROS}, sort_keys=True, separators=(",", ":"))
    assert "not in the form" in refusal(seal(spaced.replace('"format":2', '"format": 2'), arrays))
    length = int.from_bytes(DATA[:8], "little")
    padded = struct.pack("<Q", length + 8) + DATA[8 : 8 + length] + b" " * 8 + DATA[8 + length :]
    padded = padded.replace(structure["digest"].encode(), ZEROS.encode())
    assert "not in the form" in refusal(sign(padded))


def test_arrays_of_other_types_and_sizes_are_refused():
    def replaced(name, array):
        return refusal(changed(lambda _, arrays: arrays.update({name: array})))

    weight = PROGRAM.parameters["fc.weight"]
    assert "type F16" in replaced("fc.weight", weight.astype(np.float16))
    assert "type BOOL" in replaced("fc.weight", weight > 0)
    assert "float32, not int8" in replaced("fc.weight", weight.astype(np.float32))
    assert "does not fit a weight" in replaced("fc.weight", weight[:, 1:])
    assert "empty or misshapen" in replaced("fc.weight", weight[:0])
    assert "empty or misshapen" in replaced("fc.weight", weight[:, :, None])
    assert "not int32 or float32" in replaced("fc.multiplier", np.ones(3, np.int8))
    assert "[1, 2**24)" in replaced("fc.multiplier", np.zeros(3, np.int32))
    assert "no op uses" in replaced("fc.extra", np.ones(3, np.int32))
    assert "no op uses" in replaced("\n\0evil" * 99, np.ones(3, np.int32))
    missing = refusal(changed(lambda _, arrays: arrays.pop("conv1.weight")))
    assert "missing: ['conv1.weight']" in missing


def test_rules_of_programs_hold_for_files():
    with pytest.raises(ProgramError, match=r"lenet\.st holds a program that cannot be: .*cycle"):
        from_bytes(changed(lambda s, _: s["ops"][0].update(inputs=["fc"])), "lenet.st")
    odd = refusal(changed(lambda s, _: s["tensors"]["x"]["qparams"].update(zero_point=3)))
    assert "must be an even number" in odd


def test_a_billion_ops_do_not_fit_the_header():
    structure, arrays = unpack(DATA)
    structure["ops"] = structure["ops"] * 40_000
    assert "are the limit" in refusal(seal(structure, arrays))
    structure["ops"] = structure["ops"][:20_000]
    assert "1 to 10000 ops" in refusal(seal(structure, arrays))


# -- files on disk -------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    path = tmp_path / "p.safetensors"
    PROGRAM.save(path)
    assert path.read_bytes() == DATA
    assert hashlib.sha256(path.read_bytes()).hexdigest() == PROGRAM.sha256
    assert load(path) == load(str(path)) == PROGRAM


def test_load_says_why_it_cannot_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    for path, reason in [
        (tmp_path / "absent", "does not exist"),
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "x", "not a folder"),
        (tmp_path / "pipe", "device or a pipe"),
        (tmp_path / "file", "0 bytes"),
        ("nul\0byte", "null (byte|character)"),
        ("x" * 5000, "File name too long"),
    ]:
        with pytest.raises(StorageError, match=reason):
            load(path)
    monkeypatch.setattr(storage, "MAX_FILE_BYTES", 100)
    (tmp_path / "file").write_bytes(DATA)
    with pytest.raises(StorageError, match="Is it the right file"):
        load(tmp_path / "file")


def test_a_sparse_file_beyond_the_limit_is_not_read(tmp_path):
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(StorageError, match="1,099,511,627,776 bytes"):
        load(tmp_path / "huge")


def test_load_reports_missing_permission(tmp_path, monkeypatch):
    PROGRAM.save(tmp_path / "p")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "p")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StorageError, match="permission denied"):
        load(tmp_path / "p")


def test_write_says_why_it_cannot(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    os.mkfifo(tmp_path / "pipe")
    for path, reason in [
        (tmp_path / "absent" / "p", r"absent does not exist.*create the folder"),
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "p", "does not exist|not a folder"),
        (tmp_path / "pipe", "device or a pipe"),
        ("nul\0byte", "null (byte|character)"),
        ("x" * 5000, "File name too long"),
    ]:
        with pytest.raises(StorageError, match=reason):
            write_atomically(path, b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "pipe"]


@pytest.mark.parametrize("moment", ["open", "fsync", "replace"])
@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (OSError(28, "No space left on device"), StorageError),
        (PermissionError(13, "Permission denied", "there"), StorageError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (MemoryError(), MemoryError),
    ],
)
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch, moment, error, seen
):
    path = tmp_path / "results.json"
    path.write_bytes(b"old")

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(*{"replace": (Path, "replace")}.get(moment, (os, moment)), fail)
        with pytest.raises(seen):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_permissions_follow_the_umask_and_stay_on_replacement(tmp_path):
    path = tmp_path / "p"
    before = os.umask(0o027)
    try:
        write_atomically(path, b"1")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o600)
    write_atomically(path, b"2")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes() == b"2"


def test_a_read_only_file_is_not_replaced(tmp_path, monkeypatch):
    path = tmp_path / "p"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everything
    with pytest.raises(StorageError, match="permission denied"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_a_program_beyond_the_header_is_refused_when_it_is_written(monkeypatch):
    monkeypatch.setattr(storage, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(StorageError, match="too large for a file"):
        to_bytes(PROGRAM)


@pytest.mark.parametrize("old", [False, True])
def test_weights_of_torch_are_called_that_with_what_makes_a_program_of_them(tmp_path, old):
    path = tmp_path / "net.pt"
    torch.save({"w": torch.zeros(3)}, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(StorageError, match=r"net\.pt is an archive or a pickle, as torch") as error:
        load(path)
    assert "`intact quantize --model FILE.py:NAME --weights FILE --data SOURCE`" in str(error.value)
