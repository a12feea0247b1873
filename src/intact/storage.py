"""A program and its file: one safetensors file, no pickle, the same bytes for the same program.

The file holds the parameters under their names, and in one metadata entry, `intact`, everything
else as canonical JSON (sorted keys, no spaces, ASCII):

    digest   SHA-256 of the whole file, computed with these 64 hex digits set to 0
    format   2
    inputs, outputs, info    as in `Program`
    ops      [{"op": "Conv2d", and the fields of that op}, …]
    tensors  {name: {"shape": […], "qparams": {the fields of QParams}}}

The digest finds accidents; it is no signature. So a file is validated in full whatever its digest,
and it is accepted only if it is, byte for byte, what `to_bytes` makes of the program in it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import reprlib
import secrets
import stat
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, get_args

import numpy as np
import safetensors

from intact.arithmetic import QParams
from intact.errors import IntactError, ProgramError, StorageError
from intact.ops import Op
from intact.program import Array, Program, QTensor, field_error

__all__ = ["FORMAT", "from_bytes", "load", "save", "to_bytes", "write_atomically"]

FORMAT = 2
MAX_FILE_BYTES = 2**32
MAX_HEADER_BYTES = 2**24
"""10,000 ops take about 5 MB; a JSON parser needs some 30 times that while it reads them."""

_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}
"""In the order in which their tensors stand in the file: widest first, so that all are aligned."""
_LENGTH_BYTES = 8
_MAGIC = b'{"__metadata__":{"intact":"{\\"digest\\":\\"'
_DIGEST_AT = _LENGTH_BYTES + len(_MAGIC)
_NO_DIGEST = "0" * hashlib.sha256().digest_size * 2
_FOREIGN = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))
"""What the files of torch.save begin with: a zip archive, or once a pickle of some protocol."""
_OPS = {cls.__name__: cls for cls in get_args(Op)}
_FIELDS = {"digest", "format", "info", "inputs", "ops", "outputs", "tensors"}


# -- writing -------------------------------------------------------------------------------------


def to_bytes(program: Program) -> bytes:
    """The program's file. Equal programs give equal bytes, on every machine.

    The layout is written here, not by the safetensors library, because the file's hash is the
    program's identity: a new version of the library must not change it.
    """
    structure = {
        "digest": _NO_DIGEST,
        "format": FORMAT,
        "info": dict(program.info),
        "inputs": program.inputs,
        "ops": [{"op": type(op).__name__, **asdict(op)} for op in program.ops],
        "outputs": program.outputs,
        "tensors": {
            name: {"shape": tensor.shape, "qparams": asdict(tensor.qparams)}
            for name, tensor in program.tensors.items()
        },
    }
    kinds = {dtype: kind for kind, dtype in _DTYPES.items()}
    order = list(_DTYPES)
    entries = sorted(
        (order.index(kinds[array.dtype.newbyteorder("<")]), name, array)
        for name, array in program.parameters.items()
    )
    header: dict[str, Any] = {"__metadata__": {"intact": _canonical(structure, sort=True)}}
    chunks = []
    end = 0
    for place, name, array in entries:
        begin, end = end, end + array.nbytes
        shape = list(array.shape)
        header[name] = {"dtype": order[place], "shape": shape, "data_offsets": [begin, end]}
        chunks.append(array.astype(_DTYPES[order[place]], copy=False).tobytes())
    text = _canonical(header, sort=False).encode("ascii")
    text += b" " * (-len(text) % _LENGTH_BYTES)
    if len(text) > MAX_HEADER_BYTES or end > MAX_FILE_BYTES - MAX_HEADER_BYTES:
        raise StorageError(
            f"the program is too large for a file: {len(text):,} bytes of structure (at most "
            f"{MAX_HEADER_BYTES:,}) and {end:,} of parameters. Shorten the names, or split it."
        )
    data = b"".join([len(text).to_bytes(_LENGTH_BYTES, "little"), text, *chunks])
    digest = _digest(data).encode("ascii")
    return data[:_DIGEST_AT] + digest + data[_DIGEST_AT + len(digest) :]


def save(program: Program, path: str | os.PathLike[str]) -> None:
    """Write the program to a file, atomically; the folder must exist."""
    write_atomically(path, to_bytes(program))


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that at every moment `path` holds all of the old content or all of the new.

    A temporary file in the same folder is written, flushed to the disk and renamed; whatever
    stops it, KeyboardInterrupt included, the temporary file is removed. A new file gets the
    permissions that the umask grants, an existing one keeps its own. A symbolic link is followed.
    Raises `StorageError` that says what to do.
    """
    try:
        target = Path(os.path.realpath(path))
        before = target.stat() if target.exists() else None
        if not target.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "no folder", str(target.parent))
        if before and stat.S_ISDIR(before.st_mode):
            raise IsADirectoryError(errno.EISDIR, "is a folder", str(target))
        if before and not stat.S_ISREG(before.st_mode):
            raise StorageError(f"cannot write {path}: it is a device or a pipe. Name a file.")
        if before and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, "read-only", str(target))
        _replace(target, data, stat.S_IMODE(before.st_mode) if before else None)
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot write {_shown(path)}: {_reason(error)}") from error


def _replace(target: Path, data: bytes, mode: int | None) -> None:
    temporary = target.with_name(f".intact-{secrets.token_hex(8)}.tmp")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            temporary.chmod(mode)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # the rename survives a power cut; not every system can sync a folder
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# -- reading -------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str]) -> Program:
    """Read and validate a program; `IntactError` says what is wrong with the file, and where."""
    try:
        status = Path(path).stat()
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
        if not stat.S_ISREG(status.st_mode):
            raise StorageError(f"cannot read {path}: it is a device or a pipe. Name a file.")
        if status.st_size > MAX_FILE_BYTES:
            raise StorageError(
                f"{path} has {status.st_size:,} bytes; no program is larger than "
                f"{MAX_FILE_BYTES:,}. Is it the right file?"
            )
        with Path(path).open("rb") as file:
            data = file.read(status.st_size)
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {_shown(path)}: {_reason(error)}") from error
    return from_bytes(data, str(path))


def from_bytes(data: bytes, origin: str = "the data") -> Program:
    """The program in the bytes of a file; `origin` names them in messages.

    Raises `StorageError` where they are no file of ours, damaged, or of another format, and
    `ProgramError` where the program in them breaks a rule. Runs no code from the file.
    """
    try:
        structure = _structure(data)
        program = _program(structure, _parameters(data))
    except StorageError as error:
        raise StorageError(f"{origin} {error}") from error
    except IntactError as error:
        raise ProgramError(f"{origin} holds a program that cannot be: {error}") from error
    if to_bytes(program) != data:
        raise StorageError(
            f"{origin} holds a program, but not in the form in which intact writes it; another "
            "tool has rewritten it. Save it again with intact."
        )
    return program


def _structure(data: bytes) -> dict[str, Any]:
    """The decoded metadata of an undamaged file of this format."""
    if len(data) < _LENGTH_BYTES:
        raise StorageError(f"is no program: it has {len(data)} bytes. Was it written completely?")
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    follow = len(data) - _LENGTH_BYTES
    if length > min(follow, MAX_HEADER_BYTES):
        if data.startswith(_FOREIGN):
            raise StorageError(
                "is an archive or a pickle, as torch.save writes weights, and no program. "
                "`intact quantize --model FILE.py:NAME --weights FILE --data SOURCE` makes a "
                "program of weights, and `intact.quantize` one of a module in Python."
            )
        raise StorageError(
            f"is no program, or is cut short: its header would take {length:,} bytes, but "
            f"{follow:,} follow and {MAX_HEADER_BYTES:,} are the limit. Copy it again."
        )
    header = data[_LENGTH_BYTES : _LENGTH_BYTES + length]
    if not header.startswith(_MAGIC):
        raise StorageError(_explain_foreign(header))
    stated = data[_DIGEST_AT : _DIGEST_AT + len(_NO_DIGEST)]
    if stated != (actual := _digest(data).encode("ascii")):
        raise StorageError(
            f"is damaged or cut short: its digest is {actual[:8].decode('ascii')}…, but it states "
            f"{stated[:8].decode('latin-1')!a}…. Copy it again from where it came from."
        )
    metadata = _parse(header.decode("latin-1"))["__metadata__"]
    structure = _parse(metadata["intact"] if isinstance(metadata, dict) else None)
    version = structure.get("format")
    if type(version) is not int or version != FORMAT:
        raise StorageError(
            f"is of format {reprlib.repr(version)}, but this version of intact reads format "
            f"{FORMAT}. Use the version that wrote it, or quantize again."
        )
    if set(structure) != _FIELDS:
        wrong = sorted(set(structure) ^ _FIELDS)[0][:50]
        raise StorageError(f"is malformed: its structure lacks or should not have {wrong!r}.")
    return structure


def _explain_foreign(header: bytes) -> str:
    try:
        metadata = _parse(header.decode("utf-8")).get("__metadata__")
    except (StorageError, ValueError):
        return "is no safetensors file, so it is no program, or it is damaged."
    if isinstance(metadata, dict) and "intact" in metadata:
        return "is damaged, or another tool has rewritten it. Save it again with intact."
    return (
        "is a safetensors file, but holds no program of intact: it may be a float network's "
        "weights. `intact quantize --model FILE.py:NAME --weights FILE --data SOURCE` makes a "
        "program of them; Program.save writes one."
    )


def _digest(data: bytes) -> str:
    """SHA-256 of a file with the digits of its digest set to 0."""
    view = memoryview(data)
    digest = hashlib.sha256(view[:_DIGEST_AT])
    digest.update(_NO_DIGEST.encode("ascii"))
    digest.update(view[_DIGEST_AT + len(_NO_DIGEST) :])
    return digest.hexdigest()


def _parameters(data: bytes) -> dict[str, Array]:
    """The arrays of the file; the library checks that every one lies within it."""
    try:
        entries = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise StorageError(f"is no valid safetensors file: {str(error)[:200]}.") from error
    arrays = {}
    for name, entry in entries:
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise StorageError(
                f"has a parameter {name[:100]!r} of type {entry['dtype']}; a program has only "
                f"{', '.join(_DTYPES)}."
            )
        try:
            shaped = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
        except ValueError as error:
            shape = f"{len(entry['shape'])}-dimensional"
            raise StorageError(f"has a parameter {name[:100]!r} that cannot be {shape}.") from error
        arrays[name] = shaped.astype(dtype.newbyteorder("="), copy=False)
    return arrays


def _program(structure: Mapping[str, Any], parameters: Mapping[str, Array]) -> Program:
    info, tensors, ops = structure["info"], structure["tensors"], structure["ops"]
    ends = (structure["inputs"], structure["outputs"])
    if not isinstance(info, dict) or not isinstance(tensors, dict):
        raise StorageError("is malformed: info and tensors are objects.")
    if not all(isinstance(part, list) for part in (ops, *ends)):
        raise StorageError("is malformed: inputs, ops and outputs are lists.")
    return Program(
        inputs=tuple(ends[0]),
        outputs=tuple(ends[1]),
        ops=tuple(_op(i, fields) for i, fields in enumerate(ops)),
        tensors={name: _tensor(name, fields) for name, fields in tensors.items()},
        parameters=parameters,
        info=info,
    )


def _op(index: int, fields: object) -> Op:
    if not isinstance(fields, dict):
        raise StorageError(f"is malformed: op {index} is no object.")
    kind, values = fields.get("op"), _tuples({k: v for k, v in fields.items() if k != "op"})
    cls = _OPS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise StorageError(
            f"has an op {index} of an unknown kind, {str(kind)[:50]!r}; the kinds are "
            f"{', '.join(_OPS)}. A newer version of intact may have written it."
        )
    if wrong := field_error(cls, values):
        raise StorageError(f"is malformed: op {index}, {cls.__name__}: {wrong}.")
    op: Op = cls(**values)
    return op


def _tensor(name: str, fields: object) -> QTensor:
    where = f"is malformed: tensor {name[:100]!r}"
    if not isinstance(fields, dict) or not isinstance(fields.get("qparams"), dict):
        raise StorageError(f"{where} has no qparams.")
    grid = _tuples(fields["qparams"])
    if wrong := field_error(QParams, grid):
        raise StorageError(f"{where}: {wrong}.")
    values = {**_tuples(fields), "qparams": QParams(**grid)}
    if wrong := field_error(QTensor, values):
        raise StorageError(f"{where}: {wrong}.")
    return QTensor(**values)


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


# -- JSON and messages ---------------------------------------------------------------------------


def _canonical(value: object, sort: bool) -> str:
    return json.dumps(
        value, sort_keys=sort, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def _parse(text: object) -> dict[str, Any]:
    """A JSON object, read strictly: no duplicate keys, no huge integers, no NaN or Infinity."""
    try:
        value = json.loads(
            text if isinstance(text, str) else "",
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_constant=_refuse_constant,
        )
    except RecursionError as error:
        raise StorageError("is malformed: its JSON is nested too deeply.") from error
    except ValueError as error:  # JSONDecodeError is one
        raise StorageError(f"is malformed: its JSON is invalid: {str(error)[:200]}.") from error
    if not isinstance(value, dict):
        raise StorageError("is malformed: its JSON is no object.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice[:100]!r} stands there twice")
    return unique


def _integer(digits: str) -> int:
    if len(digits) > 20:  # int() takes time quadratic in them
        raise ValueError(f"an integer of {len(digits):,} digits")
    return int(digits)


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _shown(path: object) -> str:
    return ascii(str(path)) if not str(path).isprintable() else str(path)


def _reason(error: OSError | ValueError) -> str:
    """Why the system refused, and what to do."""
    match error:
        case FileNotFoundError():
            return f"{error.filename} does not exist. Check the path, or create the folder."
        case IsADirectoryError():
            return "it is a folder. Name a file in it."
        case NotADirectoryError():
            return "a part of the path is a file, not a folder."
        case PermissionError():
            return "permission denied. Choose another place, or change its permissions."
        case OSError():
            return f"{error.strerror or error}."
        case _:
            return f"{error}."
