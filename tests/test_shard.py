"""A safetensors file is read as the library reads it, and refused where its header does not fit the file."""

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from model.shard import Part, Shard

F32 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
NEXT = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}
GOOD = {"a": F32, "b": NEXT, "__metadata__": {"format": "pt"}}


def write(path: Path, header: Any, size: int = 32, length: int | None = None) -> Path:
    """Write a file with this header (JSON text as it is) and `size` bytes of tensors."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(size))
    return path


def library_takes(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            file.keys()
    except (SafetensorError, OSError):
        return False
    return True


DTYPES = [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shard") / "some.safetensors"
    shapes = {"vector": (7,), "matrix": (9, 5), "empty": (0, 3)}
    tensors = {
        f"{name} {dtype}": torch.randint(256, (*shape, dtype.itemsize), dtype=torch.uint8)
        .view(dtype)[..., 0]
        .contiguous()
        for name, shape in shapes.items()
        for dtype in DTYPES
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return path


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_parts_are_the_librarys(file: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(load_file(file))))
    want, span = load_file(file)[name], lambda size: tuple(sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2))))
    part = Part(span(len(want)), span(want.shape[1]) if want.dim() > 1 else None)
    want = want[slice(*part.rows)] if part.columns is None else want[slice(*part.rows), slice(*part.columns)]
    into = torch.empty_like(want, memory_format=torch.contiguous_format)
    shard = Shard(file)
    got = shard.read(name, part, into)
    assert got is into
    for out in (got, shard.read(name, part), shard.read(name, part, torch.empty(99))):
        assert out.dtype == want.dtype and torch.equal(out.view(torch.uint8), want.contiguous().view(torch.uint8))


def changed(**changes: Any) -> dict:
    return GOOD | {"b": NEXT | changes}


BROKEN = {
    "overlap": (changed(data_offsets=[20, 28]), "'b' overlaps with 'a': it begins at byte 20, not 24"),
    "gap": (GOOD | {"b": NEXT | {"data_offsets": [26, 34]}}, "'b' leaves a gap behind 'a'"),
    "too short for its shape": (
        changed(data_offsets=[24, 30]),
        r"'b': BF16 \[4\] has 8 bytes, its data_offsets .* have 6",
    ),
    "behind the end": (
        changed(shape=[8], data_offsets=[24, 40]),
        "its tensors end at byte 40 behind the header, the file",
    ),
    "backwards": (changed(data_offsets=[32, 24]), "'b' has data_offsets"),
    "one offset": (changed(data_offsets=[24]), "'b' has data_offsets"),
    "negative": (changed(data_offsets=[-8, 0]), "'b' has data_offsets"),
    "a fraction": (changed(data_offsets=[24.0, 32.0]), "'b' has data_offsets"),
    "a huge shape": (changed(shape=[2**40, 2**40]), "'b' has shape"),
    "a negative shape": (changed(shape=[-4]), "'b' has shape"),
    "a shape that is none": (changed(shape=4), "'b' has shape 4"),
    "an unknown dtype": (changed(dtype="F99"), "'b' has dtype 'F99', which safetensors files do not have"),
    "no dtype": (GOOD | {"b": {"shape": [4], "data_offsets": [24, 32]}}, "'b' must have dtype, shape and data_offsets"),
    "a tensor that is a number": (GOOD | {"b": 5}, "'b' must have dtype"),
    "too few bytes": ({"a": F32}, "its tensors end at byte 24 behind the header, the file at 32"),
    "a list": ([], "its header is not a JSON object"),
    "no JSON": (b"nonsense", "its header is not JSON"),
    "deep": (b'{"a":' * 200_000, "its header is nested too deeply"),
    "no UTF-8": (b'{"\xff": 1}', "its header is not JSON"),
    "a long number": (b'{"a": ' + b"9" * 10_000 + b"}", "its header is not JSON"),
    "twice": (json.dumps(GOOD).replace('"b"', '"a"').encode(), "its header is not JSON: 'it has a twice'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_header_is_one_clear_line(case: str, tmp_path: Path) -> None:
    """The library refuses the same."""
    header, message = BROKEN[case]
    path = write(tmp_path / "broken.safetensors", header)
    with pytest.raises(ValueError, match=message) as error:
        Shard(path)
    text = str(error.value)
    assert text.startswith(f"{path}: not a whole safetensors file (") and "\n" not in text and len(text) < 500
    assert not library_takes(path)


def test_the_unbroken_one_is_taken(tmp_path: Path) -> None:
    path = write(tmp_path / "good.safetensors", GOOD)
    assert library_takes(path) and Shard(path).tensors.keys() == {"a", "b"}
    spaced = write(tmp_path / "spaced.safetensors", json.dumps(GOOD).encode() + b"    ")
    assert library_takes(spaced) and Shard(spaced).tensors == Shard(path).tensors


@pytest.mark.parametrize("length", [2**33, 2**63, 2**64 - 1])
def test_a_header_of_gigabytes_takes_no_memory(length: int, tmp_path: Path) -> None:
    path = write(tmp_path / "long.safetensors", GOOD, length=length)
    with pytest.raises(ValueError, match=f"its header says that it alone has {length:,} behind the first 8"):
        Shard(path)
    if length == 2**33:
        os.truncate(path, 2**34)  # a sparse file in which it has room
        with pytest.raises(ValueError, match=f"its header has {length:,} bytes; at most 67,108,864 are taken"):
            Shard(path)


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    began = time.monotonic()
    for name in ("pipe", "device"):
        with pytest.raises(ValueError, match=f"{name}: it is not a regular file"):
            Shard(tmp_path / name)
    with pytest.raises(ValueError, match=r"none: cannot be opened \(No such file or directory\)"):
        Shard(tmp_path / "none")
    assert time.monotonic() - began < 5


def test_a_git_lfs_pointer_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 4302317880\n")
    with pytest.raises(ValueError, match="model.safetensors: is a git-LFS pointer, not the file: git lfs pull"):
        Shard(path)
