"""Weights from a Hugging Face folder, streamed: each rank reads only the bytes of its own tensors.

Which tensor fills which parameter, and how it is split, is the table of `model/checkpoint.py`.

A tensor in block fp8 has its scales beside it, `NAME_scale_inv`. Where the parameter is fp8 too, both are copied as
they are, always together; elsewhere the tensor is dequantised on the way.

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
    """Fill `model` from the safetensors files in `folder`. ValueError names every tensor that is wrong."""
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

    Not through a mapping but with `pread`: a node's ranks share the page cache either way, but a disk that fails and a
    file that has become shorter are an OSError here, which one can survive, and a SIGBUS there. Files are opened once;
    one that is replaced by another is still read as it was.
    """

    def __init__(self, folder: str | Path, config: ModelConfig):
        """`folder`: as `load_weights` has found it to be good."""
        self.folder = folder
        self.files = {name: stored.path for name, stored in read_headers(Path(folder)).items()}
        self.entries: dict[tuple[int, int], list[Entry]] = defaultdict(list)  # by MoE layer and expert
        for entry in checkpoint_table(config):
            if entry.expert is not None:
                self.entries[entry.moe_layer, entry.expert].append(entry)
        self.opened = {path: _File(path) for path in sorted(set(self.files.values()))}

    def read(self, layer: int, expert: int, into: Slots, slot: int) -> None:
        """All that belongs to an expert of a MoE layer, into a slot on the host. OSError, ValueError: the slot may then
        hold anything."""
        tensors = into[slot]
        for entry in self.entries[layer, expert]:
            parameter = entry.parameter.rsplit(".", 1)[1]
            target = tensors[parameter][slice(*entry.rows)]
            value = self._read(entry.name, target)
            value, scale = _fit(self.folder, entry, target.dtype, value, self._read, self.files)
            target.copy_(value)  # nothing, if that is where it was read to
            if scale is not None:
                tensors[f"{parameter}_scale_inv"][slice(*_blocks(*entry.rows))].copy_(scale)
        tensors[IDENTITY].fill_(expert)

    def _read(self, name: str, into: Tensor | None = None) -> Tensor:
        return self.opened[self.files[name]].read(name, into)

    def close(self) -> None:
        while self.opened:
            os.close(self.opened.popitem()[1].number)


class _File:
    """A safetensors file: the length of a JSON header (8 bytes), the header, the tensors' bytes."""

    DTYPES = {"F8_E4M3": FP8, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

    def __init__(self, path: Path):
        self.path, self.number = path, os.open(path, os.O_RDONLY)
        length = int.from_bytes(os.pread(self.number, 8, 0), "little")
        self.header, self.begin = json.loads(os.pread(self.number, length, 8)), 8 + length
        self.seen = self._stamp()

    def _stamp(self) -> tuple[int, int]:
        stat = os.fstat(self.number)
        return stat.st_size, stat.st_mtime_ns

    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        """A tensor: `into`, if it is of the same shape and dtype, else one of its own. OSError if it cannot be read."""
        if self._stamp() != self.seen:
            raise OSError(f"{self.path}: it has changed since it was opened")
        about = self.header[name]
        dtype, shape, (first, end) = self.DTYPES[about["dtype"]], torch.Size(about["shape"]), about["data_offsets"]
        if into is None or (into.dtype, into.shape) != (dtype, shape):
            into = torch.empty(shape, dtype=dtype)
        room = memoryview(into.view(torch.uint8).numpy()).cast("B")
        done = 0
        while done < end - first:
            count = os.preadv(self.number, [room[done:]], self.begin + first + done)
            if not count:
                raise OSError(f"{self.path}: it ends within {name}")
            done += count
        return into


def _blocks(first: int | None, end: int | None) -> tuple[int, int | None]:
    """The blocks of a part that begins with a whole one."""
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
    """`value`, the part `share` of a stored tensor, as a parameter of `dtype` takes it: in fp8 with its part of the
    scales, else dequantised. `read(name)` gets another tensor whole."""
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
    """The views that this tensor fills on this rank: for an expert, one in each slot that holds it; often none."""
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
    mine = slice(mesh.attn.rank * share, (mesh.attn.rank + 1) * share)
    return (slice(None),) * entry.split + (mine,)
