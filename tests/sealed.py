"""A program's file taken apart and put together again, independently of `intact.storage`.

The safetensors library writes the file here, so the tests see a file that a stranger may have made:
its digest is right, whatever else is wrong.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from safetensors.numpy import load
from safetensors.numpy import save as save_tensors

ZEROS = "0" * 64


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The structure and the arrays of a file."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return json.loads(header["__metadata__"]["intact"]), load(data)


def seal(structure: dict[str, Any] | str, arrays: dict[str, Any], **metadata: str) -> bytes:
    """A file with a right digest; `structure` may be text, in which `ZEROS` stands for it."""
    if not isinstance(structure, str):
        structure = json.dumps(
            {**structure, "digest": ZEROS}, sort_keys=True, separators=(",", ":")
        )
    return sign(save_tensors(arrays, {"intact": structure, **metadata}))


def sign(data: bytes) -> bytes:
    digest = hashlib.sha256(data).hexdigest()
    return data.replace(ZEROS.encode(), digest.encode(), 1)
