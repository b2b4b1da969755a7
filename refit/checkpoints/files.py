"""The safetensors files of a folder: their headers, checked against the files themselves. Needs no torch.

A file is 8 bytes with the length of its header, little-endian; the header, JSON with dtype, shape and place of every
tensor; and the tensors without gaps, row-major (https://huggingface.co/docs/safetensors). Several files have an index
beside them that says which has which tensor.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refit.errors import UsageError

INDEX_NAME, SINGLE_NAME, CONFIG_NAME = "model.safetensors.index.json", "model.safetensors", "config.json"
MAX_HEADER_BYTES = 100_000_000
"""As the library has it."""

DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "BOOL": "bool",
}
"""A dtype in a header -> torch's name of it. There are others, which no weights have."""

ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I16": 2, "I32": 4, "I64": 8, "U16": 2, "U32": 4, "U64": 8}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file. `dtype` is the header's word (`BF16`), `offset` that of its first byte in the file."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoredFolder:
    """The tensors of a folder by name, its files with their sizes in bytes, and its config.json, empty without one."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    files: Mapping[Path, int]
    config: Mapping[str, Any]


def read_folder(folder: Path) -> StoredFolder:
    """Read all headers of a folder.

    Raises UsageError where it holds no safetensors, where its index names a file or a tensor that is not there, and
    where a file is cut off or is no safetensors file.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is {'no folder' if folder.exists() else 'not there'}: give a folder of safetensors")
    index = folder / INDEX_NAME
    if index.exists():
        tensors = _indexed(folder, index)
    else:
        single = folder / SINGLE_NAME
        paths = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
        if not paths:
            raise UsageError(f"{folder} has no *.safetensors and no {INDEX_NAME}: give a folder of safetensors")
        tensors = {}
        for path in paths:
            for name, tensor in read_header(path).items():
                if name in tensors:
                    raise UsageError(
                        f"{name} is in {tensors[name].path} and in {path}: without an index either may be it"
                    )
                tensors[name] = tensor
    files = {path: path.stat().st_size for path in sorted({tensor.path for tensor in tensors.values()})}
    config = _json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).exists() else {}
    return StoredFolder(folder, tensors, files, config)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name. Raises UsageError where it is cut off or no safetensors file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            if not 2 <= length <= MAX_HEADER_BYTES:
                raise UsageError(f"{path} is no safetensors file: its header would have {length:,} bytes")
            if 8 + length > size:
                raise UsageError(f"{path} is cut off: its header ends at byte {8 + length:,}, the file at {size:,}")
            text = file.read(length)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    try:
        header = json.loads(text)
        found = {name: _stored(name, path, each, 8 + length) for name, each in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} is no safetensors file: its header cannot be read: {error!r}") from None
    end = max((tensor.offset + tensor.nbytes for tensor in found.values()), default=8 + length)
    if end > size:
        last = max(found.values(), key=lambda tensor: tensor.offset)
        raise UsageError(
            f"{path} is cut off: {last.name} ends at byte {end:,}, the file at {size:,}: copy or download it again"
        )
    return found


def _stored(name: str, path: Path, entry: Mapping[str, Any], base: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    shape, dtype = tuple(int(size) for size in entry["shape"]), str(entry["dtype"])
    expected = math.prod(shape) * ITEMSIZE.get(dtype, 1)
    if end - begin != expected or begin < 0 or any(size < 0 for size in shape):
        raise UsageError(
            f"{path}: {name} {list(shape)} in {dtype} takes {expected:,} bytes, its header gives it {end - begin:,}"
        )
    return StoredTensor(name, path, dtype, shape, base + begin, end - begin)


def _indexed(folder: Path, index: Path) -> dict[str, StoredTensor]:
    content = _json(index)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise UsageError(f"{index} has no weight_map from tensors to files")
    headers: dict[str, dict[str, StoredTensor]] = {}
    for name, file in places.items():
        if file not in headers:
            if not (folder / file).exists():
                raise UsageError(f"{index} names {file}, which is not there: it should have {name}")
            headers[file] = read_header(folder / file)
        if name not in headers[file]:
            raise UsageError(f"{index} says that {name} is in {file}, which has no such tensor")
    return {name: headers[file][name] for name, file in places.items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content
