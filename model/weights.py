"""Weights, streamed into the model: each rank reads only the bytes of its own shares, a few tensors at a time.

The table in `model/checkpoint.py` says which tensor fills which parameter, and how it is split. The numbers come from a
`Source`: a checkpoint's files, or `DummyWeights`.

The scales of a tensor NAME in block fp8 are the tensor `NAME_scale_inv`. If the parameter is fp8 too, both are copied
as they are, always together. Otherwise the tensor is dequantised while loading.

`ExpertReader` reads single experts again while the model serves.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from threading import Lock
from types import EllipsisType
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from kernels.fp8 import dequantize_128x128
from kernels.fp8_format import BLOCK
from model.checkpoint import THREADS, Entry, blocks, checkpoint_table
from model.config import ModelConfig
from model.dummy import deviation, random_part
from model.layers import FP8
from model.shard import Part
from model.slots import IDENTITY, Slots
from model.transformer import Transformer
from parallel.mesh import Mesh

PIECE_BYTES = 2**25  # a larger tensor is loaded in pieces of whole blocks of rows


class Source(Protocol):
    """Where weights come from. Several threads call its methods at the same time."""

    threads: int  # how many should load pieces of it at once

    def dtype(self, entry: Entry) -> torch.dtype:
        """Return the dtype of a tensor: float8_e4m3fn if it has scales."""
        ...

    def read(self, entry: Entry, part: Part, into: Tensor) -> Tensor:
        """Return a part of a tensor, in its dtype: `into`, which has the part's shape, if the part could be put there.

        Raises OSError if it cannot be read.
        """
        ...

    def scale(self, entry: Entry, part: Part) -> Tensor:
        """Return the scales of all blocks that a part of an fp8 tensor touches, in float32."""
        ...

    def close(self) -> None: ...


class DummyWeights:
    """Random weights of a configuration, made on `device` when they are read (`model/dummy.py`).

    In fp8 configurations the projections are in fp8.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.fp8, self.device = config.fp8, device
        self.threads = THREADS if device.type == "cpu" else 1  # on a GPU, Python's launches take the time

    def dtype(self, entry: Entry) -> torch.dtype:
        return FP8 if self.fp8 and "_proj" in entry.name else torch.float32

    def read(self, entry: Entry, part: Part, into: Tensor) -> Tensor:
        dtype = self.dtype(entry)
        values = random_part(entry.name, entry.shape, part.rows, self.device, unit=dtype == FP8)
        return values.to(dtype) if part.columns is None else values[:, slice(*part.columns)].to(dtype)

    def scale(self, entry: Entry, part: Part) -> Tensor:
        return torch.full(blocks(part).shape, deviation(entry.shape), device=self.device)

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Piece:
    """Some rows of a rank's share of a tensor, and the places that they fill: several if an expert has replicas here.

    `scales`: the places of their scales, if the parameter is in fp8.
    """

    entry: Entry
    part: Part
    targets: list[Tensor]
    scales: list[Tensor]

    @torch.inference_mode()  # a thread does not inherit it, and parameters made in it are only written in it
    def load(self, source: Source) -> None:
        """Read and copy. Raises OSError if it cannot be read, ValueError if an fp8 parameter's tensor is not in fp8."""
        entry, part, first = self.entry, self.part, self.targets[0]
        value = source.read(entry, part, first)
        if value.dtype == FP8:
            scale = source.scale(entry, part)
            for target in self.scales:
                target.copy_(scale)
            if first.dtype != FP8:
                assert part.columns is not None
                value = dequantize_128x128(value, scale, part.rows[0] % BLOCK, part.columns[0] % BLOCK)
        elif first.dtype == FP8:
            raise ValueError(f"{entry.name} is in {value.dtype}, not in fp8 as config.json says")
        for target in self.targets:
            if target is not value:
                target.copy_(value)

    @property
    def num_values(self) -> int:
        return prod(self.part.shape)


def load_weights(model: Transformer, source: Source, mesh: Mesh, hide: bool | None = True) -> int:
    """Fill the parameters of this rank. Returns the bytes that were read, without scales.

    Several threads load a piece each, so the memory beyond the model is a few pieces. `hide`: show no progress bar;
    None: show it on terminals. Raises OSError if a file cannot be read, ValueError if a dtype is not as expected.
    """
    pieces = list(_pieces(model, source, mesh))
    sizes = [piece.num_values * source.dtype(piece.entry).itemsize for piece in pieces]
    bar, lock = tqdm(total=sum(sizes), desc="loading", unit="B", unit_scale=True, disable=hide), Lock()
    left = deque(zip(pieces, sizes, strict=True))

    def load_pieces() -> None:
        while True:
            with lock:
                if not left:
                    return
                piece, size = left.popleft()
            try:
                piece.load(source)
            except BaseException:
                stop()
                raise
            with lock:
                bar.update(size)

    def stop() -> None:
        """Have the threads end, each after the piece that it loads."""
        with lock:
            left.clear()

    with bar, ThreadPoolExecutor(source.threads, "load") as pool:
        try:
            for loading in [pool.submit(load_pieces) for _ in range(source.threads)]:
                loading.result()  # raises what the thread raised
        finally:
            stop()  # also at Ctrl-C, which this thread alone hears
    return sum(sizes)


def _pieces(model: Transformer, source: Source, mesh: Mesh) -> Iterator[Piece]:
    """Yield all that this rank loads, in the table's order."""
    parameters, slots = dict(model.named_parameters()), _local_slots(model, mesh)
    for entry in checkpoint_table(model.config, mesh.attn.size):
        places: Sequence[int | EllipsisType] = [...] if entry.expert is None else slots[entry.moe_layer, entry.expert]
        if not places:
            continue
        parameter, scale = parameters[entry.parameter], None
        if parameter.dtype == FP8:
            scale = parameters[f"{entry.parameter}_scale_inv"]
        (first, end), columns = share = _share(entry, mesh)
        row_bytes = source.dtype(entry).itemsize * prod(share.shape[1:])
        step = max(1, PIECE_BYTES // (BLOCK * row_bytes)) * BLOCK
        for row in range(first, end, step):
            part = Part((row, min(row + step, end)), columns)
            begin = entry.rows[0] + row - first
            here = begin, begin + part.shape[0]
            targets = [parameter[place][slice(*here)] for place in places]
            scales = [] if scale is None else [scale[place][slice(*_blocks(*here))] for place in places]
            yield Piece(entry, part, targets, scales)


def _local_slots(model: Transformer, mesh: Mesh) -> defaultdict[tuple[int, int], list[int]]:
    """Return the slots of this rank that hold an expert, by MoE layer and expert; none for most."""
    slots = defaultdict(list)
    maps = [(model.placement, row) for row in range(model.config.num_moe_layers)]
    if model.mtp is not None:
        maps.append((model.mtp.placement, 0))
    for layer, (placement, row) in enumerate(maps):
        for slot, expert in enumerate(placement.experts_on(mesh.ep.rank, row)):
            slots[layer, expert].append(slot)
    return slots


def _share(entry: Entry, mesh: Mesh) -> Part:
    """Return this rank's part of a tensor."""
    whole = Part.whole(entry.shape)
    if entry.split is None:
        return whole
    size = entry.shape[entry.split] // mesh.attn.size
    local = (mesh.attn.rank * size, (mesh.attn.rank + 1) * size)
    return whole._replace(rows=local) if entry.split == 0 else whole._replace(columns=local)


def _blocks(first: int, end: int | None) -> tuple[int, int | None]:
    """Return the range of 128-row blocks for a range of rows that begins with a whole block."""
    return first // BLOCK, None if end is None else -(-end // BLOCK)


class ExpertReader:
    """Reads single experts again and again, while the model serves. A node's ranks share the page cache."""

    def __init__(self, source: Source, config: ModelConfig) -> None:
        self.source = source
        self.entries: dict[tuple[int, int], list[Entry]] = defaultdict(list)  # by MoE layer and expert
        for entry in checkpoint_table(config):
            if entry.expert is not None:
                self.entries[entry.moe_layer, entry.expert].append(entry)

    def read(self, layer: int, expert: int, into: Slots, slot: int) -> None:
        """Read an expert of an MoE layer into a slot on the host.

        Raises OSError or ValueError if it cannot be read. The contents of the slot are then undefined.
        """
        tensors = into[slot]
        for entry in self.entries[layer, expert]:
            parameter = entry.parameter.rsplit(".", 1)[1]
            target, scales = tensors[parameter][slice(*entry.rows)], []
            if target.dtype == FP8:
                scales = [tensors[f"{parameter}_scale_inv"][slice(*_blocks(*entry.rows))]]
            Piece(entry, Part.whole(entry.shape), [target], scales).load(self.source)
        tensors[IDENTITY].fill_(expert)

    def close(self) -> None:
        self.source.close()
