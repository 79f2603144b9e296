"""Weights from a Hugging Face folder, streamed: each rank reads only the bytes of its own tensors.

`checkpoint_table` is the whole mapping: what every tensor is called on disk, the shape it must have, which of our
parameters it fills, and how it is split. The loader checks the checkpoint against it in both directions.

A tensor in block fp8 has its scales beside it, `NAME_scale_inv`. Where the parameter is fp8 too, both are copied as
they are, always together; elsewhere the tensor is dequantised on the way.

`ExpertReader` reads single experts again while the model serves.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels.fp8 import BLOCK, dequantize_128x128
from model.config import ModelConfig
from model.layers import FP8
from model.slots import IDENTITY, Slots
from model.transformer import Transformer
from parallel.mesh import Mesh
from parallel.placement import Placement


@dataclass(frozen=True)
class Entry:
    """One tensor of the checkpoint, and what it fills."""

    name: str
    shape: tuple[int, ...]
    parameter: str  # ours
    split: int | None = None  # the dim divided over mesh.attn
    rows: tuple[int, int | None] = (0, None)  # of the parameter on a rank: first, end
    expert: int | None = None  # fills the slots that hold this logical expert...
    moe_layer: int = 0  # ...of this MoE layer

    @property
    def scale_name(self) -> str:
        """Of a tensor in fp8: its scales, one for each 128x128 block."""
        return f"{self.name}_scale_inv"


def checkpoint_table(config: ModelConfig, attn_tp: int = 1) -> Iterator[Entry]:
    """Every tensor that a checkpoint of this configuration has. A tied embedding fills two parameters."""
    vocab = (config.vocab_size, config.hidden_size)
    yield Entry("model.embed_tokens.weight", vocab, "embed_tokens.weight")
    yield Entry("model.norm.weight", (config.hidden_size,), "head.norm.weight")
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    yield Entry(head, vocab, "head.lm_head.weight", split=0)
    for layer in range(config.num_hidden_layers):
        yield from _block_table(config, attn_tp, layer, f"model.layers.{layer}", f"layers.{layer}")


def _block_table(c: ModelConfig, attn_tp: int, layer: int, theirs: str, ours: str) -> Iterator[Entry]:
    hidden, heads = c.hidden_size, c.num_attention_heads
    attention = {
        "kv_a_layernorm": ((c.kv_lora_rank,), None),
        "kv_b_proj": ((heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank), 0),
        "o_proj": ((hidden, heads * c.v_head_dim), 1),
    }
    all_heads = heads * c.qk_head_dim
    if c.q_lora_rank is None:
        name, rows, split, mine = "q_proj", all_heads, 0, all_heads // attn_tp
    else:
        name, rows, split, mine = "q_a_proj", c.q_lora_rank, None, c.q_lora_rank
        attention["q_a_layernorm"] = ((c.q_lora_rank,), None)
        attention["q_b_proj"] = ((all_heads, c.q_lora_rank), 0)
    qkv_a = f"{ours}.self_attn.qkv_a_proj.weight"
    yield Entry(f"{theirs}.self_attn.{name}.weight", (rows, hidden), qkv_a, split, (0, mine))
    name = "kv_a_proj_with_mqa"
    yield Entry(f"{theirs}.self_attn.{name}.weight", (c.kv_dim, hidden), qkv_a, None, (mine, mine + c.kv_dim))
    for name, (shape, split) in attention.items():
        yield Entry(f"{theirs}.self_attn.{name}.weight", shape, f"{ours}.self_attn.{name}.weight", split)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield Entry(f"{theirs}.{name}.weight", (hidden,), f"{ours}.{name}.weight")

    theirs, ours = f"{theirs}.mlp", f"{ours}.mlp"
    if layer < c.first_k_dense_replace:
        yield from _ffn_table(theirs, ours, c.intermediate_size, hidden, attn_tp)
        return
    gate, bias = "gate.weight", "gate.e_score_correction_bias"
    yield Entry(f"{theirs}.{gate}", (c.n_routed_experts, hidden), f"{ours}.{gate}")
    yield Entry(f"{theirs}.{bias}", (c.n_routed_experts,), f"{ours}.{bias}")
    width, moe = c.moe_intermediate_size, layer - c.first_k_dense_replace
    if c.n_shared_experts:
        shared = c.n_shared_experts * width
        yield from _ffn_table(f"{theirs}.shared_experts", f"{ours}.shared_experts", shared, hidden)
    gate_up, down = f"{ours}.experts.gate_up_proj", f"{ours}.experts.down_proj"
    for e in range(c.n_routed_experts):
        expert = f"{theirs}.experts.{e}"
        yield Entry(f"{expert}.gate_proj.weight", (width, hidden), gate_up, None, (0, width), e, moe)
        yield Entry(f"{expert}.up_proj.weight", (width, hidden), gate_up, None, (width, 2 * width), e, moe)
        yield Entry(f"{expert}.down_proj.weight", (hidden, width), down, None, (0, None), e, moe)


def _ffn_table(theirs: str, ours: str, width: int, hidden: int, attn_tp: int = 1) -> Iterator[Entry]:
    """Divided over `attn_tp` ranks, or whole on each."""
    rows, columns, mine = (0, 1, width // attn_tp) if attn_tp > 1 else (None, None, width)
    gate_up = f"{ours}.gate_up_proj.weight"
    yield Entry(f"{theirs}.gate_proj.weight", (width, hidden), gate_up, rows, (0, mine))
    yield Entry(f"{theirs}.up_proj.weight", (width, hidden), gate_up, rows, (mine, 2 * mine))
    yield Entry(f"{theirs}.down_proj.weight", (hidden, width), f"{ours}.down_proj.weight", columns)


def load_weights(model: Transformer, folder: str | Path, config: ModelConfig, mesh: Mesh) -> None:
    """Fill `model` from the safetensors files in `folder`. ValueError names every tensor that is wrong."""
    files = _files(Path(folder))
    table = list(checkpoint_table(config, mesh.attn.size))
    wanted = {entry.name for entry in table}
    if config.fp8:
        wanted |= {name for entry in table if (name := entry.scale_name) in files}
    skipped = [name for name in files if _is_known_extra(name, config)]
    _complain(folder, "tensors are missing", sorted(wanted - files.keys()))
    _complain(folder, "tensors are not of this model", sorted(files.keys() - wanted - set(skipped)))

    parameters = dict(model.named_parameters())
    wrong = []
    with ExitStack() as stack:
        opened = {path: stack.enter_context(_open(path)) for path in sorted(set(files.values()))}
        for entry in table:
            stored = opened[files[entry.name]].get_slice(entry.name)
            if tuple(stored.get_shape()) != entry.shape:
                wrong.append(f"{entry.name} is {list(stored.get_shape())}, must be {list(entry.shape)}")
                continue
            targets = list(_targets(parameters[entry.parameter], entry, model.placement, mesh))
            if not targets:
                continue
            share = _my_share(entry, mesh)
            read = lambda name: opened[files[name]].get_tensor(name)  # noqa: E731
            value, scale = _fit(folder, entry, targets[0].dtype, stored[share], read, files, share)
            for target in targets:
                target.copy_(value)
            if scale is not None:
                blocks = replace(entry, rows=_blocks(*entry.rows))
                for place in _targets(parameters[f"{entry.parameter}_scale_inv"], blocks, model.placement, mesh):
                    place.copy_(scale)
    _complain(folder, "tensors have the wrong shape", wrong)


class ExpertReader:
    """Reads single experts of a checkpoint, again and again, while the model serves.

    Not through a mapping but with `pread`: a node's ranks share the page cache either way, but a disk that fails and a
    file that has become shorter are an OSError here, which one can survive, and a SIGBUS there. Files are opened once;
    one that is replaced by another is still read as it was.
    """

    def __init__(self, folder: str | Path, config: ModelConfig):
        """`folder`: as `load_weights` has found it to be good."""
        self.folder, self.files = folder, _files(Path(folder))
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


def _is_known_extra(name: str, config: ModelConfig) -> bool:
    """The multi-token-prediction layers, stored behind the last layer, and old checkpoints' rope frequencies."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    last = config.num_hidden_layers + config.num_nextn_predict_layers
    return name.endswith("rotary_emb.inv_freq") or (match and config.num_hidden_layers <= int(match[1]) < last)


def _files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not a safetensors index ({type(error).__name__}: {error})") from None
        _complain(folder, "shards are missing", sorted({p.name for p in files.values() if not p.is_file()}))
        present = {path: set(_names(path)) for path in set(files.values())}
        absent = sorted(name for name, path in files.items() if name not in present[path])
        _complain(folder, "tensors are missing", absent)
        return files
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ValueError(f"{folder}: it has neither model.safetensors nor model.safetensors.index.json")
    return dict.fromkeys(_names(single), single)


def _names(path: Path) -> list[str]:
    with _open(path) as file:
        return list(file.keys())


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


def _complain(folder: str | Path, what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise ValueError(f"{folder}: {len(names)} {what}: {'; '.join(names[:4])}{more}")
