"""One safetensors file: its header, checked before it is believed, and parts of its tensors.

The format (https://huggingface.co/docs/safetensors): the header's length in 8 bytes, a JSON header, the tensors' bytes
without gaps. Everything is read with `pread`, not through a memory mapping. If a disk fails or a file is truncated,
`pread` raises an OSError, which a job survives; a mapping would raise SIGBUS. Threads can read at the same time.
"""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.config import LFS_POINTER, MOST_BYTES, MOST_SIZE, shown

MOST_DIMS = 8
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}
DTYPES = {  # of weights and of scales; a model has no other
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}


class Stored(NamedTuple):
    """A tensor of a file: its dtype by safetensors' name, its shape, and the bytes first..end behind the header."""

    dtype: str
    shape: tuple[int, ...]
    first: int
    end: int


class Part(NamedTuple):
    """A rectangle of a tensor [R] or [R, C]: rows, and columns if there are two dimensions."""

    rows: tuple[int, int]
    columns: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        rows = self.rows[1] - self.rows[0]
        return (rows,) if self.columns is None else (rows, self.columns[1] - self.columns[0])

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Part":
        return cls((0, shape[0]), (0, shape[1]) if len(shape) > 1 else None)


class Shard:
    """An open safetensors file. It stays open, so a file that is replaced by another is still read as it was."""

    def __init__(self, path: Path) -> None:
        """Open the file and read its header. Raises ValueError with the file, the tensor and the rule."""
        self.path = path
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its other end
                raise ValueError(f"{path}: it is not a regular file")
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise ValueError(f"{path}: cannot be opened ({error.strerror})") from None
        self.number = self._file.fileno()
        self.seen = self._stamp()
        self.tensors = self._read_header()

    def _stamp(self) -> tuple[int, int]:
        about = os.fstat(self.number)
        return about.st_size, about.st_mtime_ns

    def _read_header(self) -> dict[str, Stored]:
        size = self.seen[0]
        start = os.pread(self.number, len(LFS_POINTER), 0)
        if start == LFS_POINTER.encode():
            raise ValueError(f"{self.path}: is a git-LFS pointer, not the file: git lfs pull")
        length = int.from_bytes(start[:8], "little")
        if len(start) < 8 or length > size - 8:
            raise self._bad(
                f"it has {size:,} bytes, and its header says that it alone has {length:,} behind the first 8"
            )
        if length > MOST_BYTES:
            raise self._bad(f"its header has {length:,} bytes; at most {MOST_BYTES:,} are taken")
        self.begin = 8 + length
        try:
            header = json.loads(os.pread(self.number, length, 8), object_pairs_hook=_unique)
        except RecursionError:
            raise self._bad("its header is nested too deeply") from None
        except ValueError as error:
            raise self._bad(f"its header is not JSON: {shown(str(error))}") from None
        if not isinstance(header, dict):
            raise self._bad("its header is not a JSON object")
        header.pop("__metadata__", None)
        tensors = {name: self._about(name, about) for name, about in header.items()}
        self._check_layout(tensors, size - self.begin)
        return tensors

    def _about(self, name: str, about: Any) -> Stored:
        """Check one tensor of the header by itself."""
        if not isinstance(about, dict) or about.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._bad(f"{shown(name)} must have dtype, shape and data_offsets, and nothing else")
        dtype, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
        if not isinstance(dtype, str) or dtype not in BITS:
            raise self._bad(f"{shown(name)} has dtype {shown(dtype)}, which safetensors files do not have")
        if not _counts(shape) or len(shape) > MOST_DIMS or any(size > MOST_SIZE for size in shape):
            rule = f"at most {MOST_DIMS} integers in 0..{MOST_SIZE}"
            raise self._bad(f"{shown(name)} has shape {shown(shape)}; it must be {rule}")
        if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._bad(f"{shown(name)} has data_offsets {shown(offsets)}; they must be its first byte and its end")
        bits = math.prod(shape) * BITS[dtype]
        if 8 * (offsets[1] - offsets[0]) != bits:
            size = f"{dtype} {list(shape)} has {bits / 8:,.10g} bytes"
            raise self._bad(f"{shown(name)}: {size}, its data_offsets {offsets} have {offsets[1] - offsets[0]:,}")
        return Stored(dtype, tuple(shape), *offsets)

    def _check_layout(self, tensors: dict[str, Stored], size: int) -> None:
        """Raise ValueError unless the tensors fill the `size` bytes behind the header, without gap or overlap."""
        end, before = 0, "the header"
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1][2:]):
            if tensor.first != end:
                what = "overlaps with" if tensor.first < end else "leaves a gap behind"
                raise self._bad(
                    f"{shown(name)} {what} {shown(before)}: it begins at byte {tensor.first:,}, not {end:,}"
                )
            end, before = tensor.end, name
        if end != size:
            raise self._bad(f"its tensors end at byte {end:,} behind the header, the file at {size:,}")

    def _bad(self, why: str) -> ValueError:
        return ValueError(f"{self.path}: not a whole safetensors file ({why})")

    def read(self, name: str, part: Part | None = None, into: Tensor | None = None) -> Tensor:
        """Read a part of a tensor, by default all of it.

        `into` is filled and returned if it is in host memory, contiguous, and of the part's dtype and shape; else the
        result is a new tensor. Raises OSError if the file has changed or cannot be read.
        """
        if self._stamp() != self.seen:
            raise OSError(f"{self.path}: it has changed since it was opened")
        stored = self.tensors[name]
        if part is None:
            shape, spans = stored.shape, [(stored.first, stored.end - stored.first)]
        else:
            shape, spans = part.shape, list(_spans(stored, part))
        dtype = DTYPES[stored.dtype]
        if (
            into is None
            or (into.dtype, into.shape, into.device.type) != (dtype, shape, "cpu")
            or not into.is_contiguous()
        ):
            into = torch.empty(shape, dtype=dtype)
        room, at = into.flatten().view(torch.uint8).numpy().data, 0
        for first, size in spans:
            self._fill(room[at : at + size], self.begin + first, name)
            at += size
        return into

    def _fill(self, room: memoryview, offset: int, name: str) -> None:
        done = 0
        while done < len(room):
            count = os.preadv(self.number, [room[done:]], offset + done)
            if not count:
                raise OSError(f"{self.path}: it ends within {name}")
            done += count

    def close(self) -> None:
        self._file.close()


def _spans(stored: Stored, part: Part) -> list[tuple[int, int]]:
    """Return the part's bytes as (first, count): one span if it has whole rows, else one per row."""
    (first, end), item = part.rows, BITS[stored.dtype] // 8
    width = math.prod(stored.shape[1:])
    if part.columns is None or part.columns == (0, width):
        return [(stored.first + first * width * item, (end - first) * width * item)]
    left, right = part.columns
    return [(stored.first + (row * width + left) * item, (right - left) * item) for row in range(first, end)]


def _counts(value: Any) -> bool:
    """Return whether this is a list of integers of at least 0."""
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object. Raises ValueError if it has a name twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"it has {name} twice")
    return made
