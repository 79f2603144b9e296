"""Weights from a Hugging Face folder, streamed: each rank reads only the bytes of its own tensors.

The table in `model/checkpoint.py` says which tensor fills which parameter, and how it is split.

The scales of a tensor NAME in block fp8 are the tensor `NAME_scale_inv`. If the parameter is fp8 too, both are copied
as they are, always together. Otherwise the tensor is dequantised while loading.

`ExpertReader` reads single experts again while the model serves.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kernels.fp8 import BLOCK, dequantize_128x128
from model.checkpoint import Entry, check_checkpoint, checkpoint_table, open_shard, read_headers
from model.config import ModelConfig
from model.layers import FP8
from model.slots import IDENTITY, Slots
from model.transformer import Transformer
from parallel.mesh import Mesh
from parallel.placement import Placement


def load_weights(model: Transformer, folder: str | Path, config: ModelConfig, mesh: Mesh) -> None:
    """Fill `model` from the safetensors files in `folder`. Raises ValueError with the tensors that are wrong."""
    files = check_checkpoint(folder, config)
    parameters = dict(model.named_parameters())
    with ExitStack() as stack:
        opened = {path: stack.enter_context(open_shard(path)) for path in sorted(set(files.values()))}
        for entry in checkpoint_table(config, mesh.attn.size):
            targets = list(_targets(parameters[entry.parameter], entry, model.placement, mesh))
            if not targets:
                continue
            share, stored = _my_share(entry, mesh), opened[files[entry.name]].get_slice(entry.name)
            read = lambda name: opened[files[name]].get_tensor(name)  # noqa: E731
            value, scale = _fit(folder, entry, targets[0].dtype, stored[share], read, files, share)
            for target in targets:
                target.copy_(value)
            if scale is not None:
                blocks = replace(entry, rows=_blocks(*entry.rows))
                for place in _targets(parameters[f"{entry.parameter}_scale_inv"], blocks, model.placement, mesh):
                    place.copy_(scale)


class ExpertReader:
    """Reads single experts of a checkpoint, again and again, while the model serves.

    It reads with `pread`, not through a memory mapping. If a disk fails or a file is truncated, `pread` raises an
    OSError, which the job survives; a mapping would raise SIGBUS. A node's ranks share the page cache either way. Files
    are opened once, so a file that is replaced by another is still read as it was.
    """

    def __init__(self, folder: str | Path, config: ModelConfig) -> None:
        """`folder`: a folder that `load_weights` has accepted."""
        self.folder = folder
        self.files = {name: stored.path for name, stored in read_headers(Path(folder)).items()}
        self.entries: dict[tuple[int, int], list[Entry]] = defaultdict(list)  # by MoE layer and expert
        for entry in checkpoint_table(config):
            if entry.expert is not None:
                self.entries[entry.moe_layer, entry.expert].append(entry)
        self.opened = {path: _File(path) for path in sorted(set(self.files.values()))}

    def read(self, layer: int, expert: int, into: Slots, slot: int) -> None:
        """Read an expert of an MoE layer into a slot on the host.

        Raises OSError or ValueError if it cannot be read. The contents of the slot are then undefined.
        """
        tensors = into[slot]
        for entry in self.entries[layer, expert]:
            parameter = entry.parameter.rsplit(".", 1)[1]
            target = tensors[parameter][slice(*entry.rows)]
            value = self._read(entry.name, target)
            value, scale = _fit(self.folder, entry, target.dtype, value, self._read, self.files)
            target.copy_(value)  # a no-op if it was read into `target`
            if scale is not None:
                tensors[f"{parameter}_scale_inv"][slice(*_blocks(*entry.rows))].copy_(scale)
        tensors[IDENTITY].fill_(expert)

    def _read(self, name: str, into: Tensor | None = None) -> Tensor:
        return self.opened[self.files[name]].read(name, into)

    def close(self) -> None:
        while self.opened:
            os.close(self.opened.popitem()[1].number)


class _File:
    """An open safetensors file: the length of a JSON header (8 bytes), the header, the tensors' bytes."""

    DTYPES = {"F8_E4M3": FP8, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

    def __init__(self, path: Path) -> None:
        self.path, self.number = path, os.open(path, os.O_RDONLY)
        length = int.from_bytes(os.pread(self.number, 8, 0), "little")
        self.header, self.begin = json.loads(os.pread(self.number, length, 8)), 8 + length
        self.seen = self._stamp()

    def _stamp(self) -> tuple[int, int]:
        stat = os.fstat(self.number)
        return stat.st_size, stat.st_mtime_ns

    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        """Read a tensor into `into` if shape and dtype match, else into a new one. Raises OSError if it cannot."""
        if self._stamp() != self.seen:
            raise OSError(f"{self.path}: it has changed since it was opened")
        about = self.header[name]
        dtype, shape, (first, end) = self.DTYPES[about["dtype"]], torch.Size(about["shape"]), about["data_offsets"]
        if into is None or (into.dtype, into.shape) != (dtype, shape):
            into = torch.empty(shape, dtype=dtype)
        room = into.view(torch.uint8).numpy().data.cast("B")
        done = 0
        while done < end - first:
            count = os.preadv(self.number, [room[done:]], self.begin + first + done)
            if not count:
                raise OSError(f"{self.path}: it ends within {name}")
            done += count
        return into


def _blocks(first: int | None, end: int | None) -> tuple[int, int | None]:
    """Return the range of 128-row blocks for a range of rows that begins with a whole block."""
    return (first or 0) // BLOCK, None if end is None else -(-end // BLOCK)


def _fit(
    folder: str | Path,
    entry: Entry,
    dtype: torch.dtype,
    value: Tensor,
    read: Callable[[str], Tensor],
    files: dict[str, Path],
    share: tuple[slice, ...] = (slice(None),),
) -> tuple[Tensor, Tensor | None]:
    """Convert `value`, the part `share` of a stored tensor, for a parameter of `dtype`.

    Returns the value and, for an fp8 parameter, its part of the scales, else None. `read(name)` reads another tensor
    whole. Raises ValueError if dtypes or scales are not as expected.
    """
    if value.dtype != FP8:
        if dtype == FP8:
            raise ValueError(f"{folder}: {entry.name} is in {value.dtype}, not in fp8 as config.json says")
        if entry.scale_name in files:
            raise ValueError(f"{folder}: {entry.name} is in {value.dtype}, but there is a {entry.scale_name}")
        return value, None
    if entry.scale_name not in files:
        raise ValueError(f"{folder}: {entry.name} is in fp8, but there is no {entry.scale_name}")
    scale = read(entry.scale_name)
    expected = tuple(-(-size // BLOCK) for size in entry.shape)
    if tuple(scale.shape) != expected:
        raise ValueError(f"{folder}: {entry.scale_name} is {list(scale.shape)}, must be {list(expected)}")
    if dtype == FP8:
        return value, scale[tuple(slice(*_blocks(part.start, part.stop)) for part in share)]
    return dequantize_128x128(value, scale, *(part.start or 0 for part in (*share, slice(0))[:2])), None


def _targets(parameter: Tensor, entry: Entry, placement: Placement, mesh: Mesh) -> Iterator[Tensor]:
    """Yield the views that a tensor fills on this rank. An expert has one per slot that holds it, often none."""
    if entry.expert is None:
        yield parameter[slice(*entry.rows)]
        return
    for slot, expert in enumerate(placement.experts_on(mesh.ep.rank, entry.moe_layer)):
        if expert == entry.expert:
            yield parameter[slot][slice(*entry.rows)]


def _my_share(entry: Entry, mesh: Mesh) -> tuple[slice, ...]:
    if entry.split is None:
        return (slice(None),)
    share = entry.shape[entry.split] // mesh.attn.size
    local_part = slice(mesh.attn.rank * share, (mesh.attn.rank + 1) * share)
    return (slice(None),) * entry.split + (local_part,)
