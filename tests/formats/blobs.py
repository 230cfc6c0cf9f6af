"""Hostile and honest file contents, written by hand so that no library smooths them."""

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

HONEST = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b.weight": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
    "empty": {"dtype": "I64", "shape": [0, 5], "data_offsets": [22, 22]},
    "scalar": {"dtype": "U8", "shape": [], "data_offsets": [22, 23]},
}


def blob(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with ``header`` (bytes as they are, anything else as JSON)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def honest() -> bytes:
    """A small sound file with four tensors."""
    return blob(HONEST, bytes(range(23)))


def one(dtype: Any = "U8", shape: Any = (1,), offsets: Any = (0, 1), data: bytes = b"\0", **more: Any) -> bytes:
    """A file with the single tensor ``w``."""
    fields = {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}
    return blob({"w": fields}, data)


def named(name: str) -> bytes:
    """A file with one sound tensor called ``name``."""
    return blob({name: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"\0")


def saved(obj: Any, **options: Any) -> bytes:
    """What ``torch.save`` writes."""
    stream = io.BytesIO()
    torch.save(obj, stream, **options)
    return stream.getvalue()


def archive(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive of ``records``."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as out:
        for name, content in records.items():
            out.writestr(name, content)
    return stream.getvalue()


def pickled(pickle_bytes: bytes, **records: bytes) -> bytes:
    """A PyTorch archive around hand-made pickle bytes."""
    plain = {"archive/data.pkl": pickle_bytes, "archive/version": b"3\n", "archive/byteorder": b"little"}
    return archive(plain | {f"archive/data/{key}": value for key, value in records.items()})


class Calls:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __call__(self) -> None:
        """Lets the result of one call be called by another."""

    def __reduce__(self) -> Any:
        return self.call


class _Storages(pickle.Pickler):
    """Writes ``Storage`` markers as PyTorch's persistent ids."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Storage):
            return ("storage", obj.kind, obj.key, "cpu", obj.numel)
        return None


class Storage:
    """A storage of ``numel`` elements kept in record ``key``."""

    def __init__(self, key: str, numel: int, kind: Any = torch.FloatStorage) -> None:
        self.key, self.numel, self.kind = key, numel, kind


def view(storage: Storage, offset: int, shape: tuple, strides: tuple) -> Calls:
    """A tensor over ``storage``."""
    return Calls(torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, False, {})


def dumped(obj: Any) -> bytes:
    """Pickle bytes of ``obj`` with ``Storage`` and ``Calls`` in it."""
    stream = io.BytesIO()
    _Storages(stream, 2).dump(obj)
    return stream.getvalue()


def put(path: Path, raw: bytes) -> Path:
    """``path``, holding ``raw``."""
    path.write_bytes(raw)
    return path
