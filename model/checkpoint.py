"""A checkpoint on disk: its tensors' names and shapes, and the parameters of ours that they fill.

`checkpoint_table` is the whole mapping. `check_checkpoint` compares the files with it, in both directions. It reads
only the files' headers (and a tied LM head, if there is one). It runs before the model is made, so a size that
config.json wrongly claims costs no memory.
"""

import os
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from kernels.fp8_format import BLOCK
from model.config import ModelConfig, read_json, shown
from model.shard import DTYPES, Part, Shard, Stored

INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHTS, SCALES = ("BF16", "F16", "F32", "F8_E4M3"), ("F32", "BF16", "F16", "F8_E8M0")  # the dtypes of each
LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
MTP_MARKS = ("eh_proj", "enorm", "hnorm", "shared_head.norm", "shared_head.head")
MTP_COPIES = ("embed_tokens.", "shared_head.head.")  # of the main model's embedding and LM head
THREADS = min(8, os.cpu_count() or 1)  # that load at once
EXTRA_ENDINGS = ("rotary_emb.inv_freq", ".k_scale", ".v_scale", ".q_scale", ".kv_scale")


@dataclass(frozen=True)
class Entry:
    """One tensor of the checkpoint, and the part of a parameter that it fills."""

    name: str
    shape: tuple[int, ...]
    parameter: str  # the name of ours
    split: int | None = None  # the dim divided over mesh.attn
    rows: tuple[int, int | None] = (0, None)  # first and end row in a rank's parameter
    expert: int | None = None  # the logical expert whose slots it fills...
    moe_layer: int = 0  # ...in this MoE layer

    @property
    def scale_name(self) -> str:
        """The name of an fp8 tensor's scales, one per 128x128 block."""
        return f"{self.name}_scale_inv"


def checkpoint_table(config: ModelConfig, attn_tp: int = 1) -> Iterator[Entry]:
    """Yield every tensor that a checkpoint of this configuration has. A tied embedding fills two parameters."""
    vocab = (config.vocab_size, config.hidden_size)
    yield Entry(EMBEDDING, vocab, "embed_tokens.weight")
    yield Entry("model.norm.weight", (config.hidden_size,), "head.norm.weight")
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    yield Entry(head, vocab, "head.lm_head.weight", split=0)
    for layer in range(config.num_hidden_layers):
        yield from _block_table(config, attn_tp, layer, f"model.layers.{layer}", f"layers.{layer}")
    if config.drafts:
        yield from _mtp_table(config, attn_tp)


def _mtp_table(c: ModelConfig, attn_tp: int) -> Iterator[Entry]:
    """Yield the multi-token-prediction layer's tensors. Its experts' `moe_layer` is behind those of the model."""
    theirs, hidden = mtp_prefix(c), c.hidden_size
    for name, parameter in (("enorm", "enorm"), ("hnorm", "hnorm"), ("shared_head.norm", "norm")):
        yield Entry(f"{theirs}{name}.weight", (hidden,), f"mtp.{parameter}.weight")
    yield Entry(f"{theirs}eh_proj.weight", (hidden, 2 * hidden), "mtp.eh_proj.weight")
    yield from _block_table(c, attn_tp, c.num_hidden_layers, theirs.removesuffix("."), "mtp.block")


def mtp_prefix(config: ModelConfig) -> str:
    """Return what the names of the layer's tensors begin with: it is stored behind the model's last layer."""
    return f"model.layers.{config.num_hidden_layers}."


def _block_table(c: ModelConfig, attn_tp: int, layer: int, theirs: str, ours: str) -> Iterator[Entry]:
    hidden, heads = c.hidden_size, c.num_attention_heads
    attention = {
        "kv_a_layernorm": ((c.kv_lora_rank,), None),
        "kv_b_proj": ((heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank), 0),
        "o_proj": ((hidden, heads * c.v_head_dim), 1),
    }
    all_heads = heads * c.qk_head_dim
    if c.q_lora_rank is None:
        name, rows, split, local_rows = "q_proj", all_heads, 0, all_heads // attn_tp
    else:
        name, rows, split, local_rows = "q_a_proj", c.q_lora_rank, None, c.q_lora_rank
        attention["q_a_layernorm"] = ((c.q_lora_rank,), None)
        attention["q_b_proj"] = ((all_heads, c.q_lora_rank), 0)
    qkv_a = f"{ours}.self_attn.qkv_a_proj.weight"
    yield Entry(f"{theirs}.self_attn.{name}.weight", (rows, hidden), qkv_a, split, (0, local_rows))
    name, kv_rows = "kv_a_proj_with_mqa", (local_rows, local_rows + c.kv_dim)
    yield Entry(f"{theirs}.self_attn.{name}.weight", (c.kv_dim, hidden), qkv_a, None, kv_rows)
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
    if c.topk_method == "noaux_tc":
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
    """Yield an FFN's tensors, divided over `attn_tp` ranks, or whole on each."""
    rows, columns, local_width = (0, 1, width // attn_tp) if attn_tp > 1 else (None, None, width)
    gate_up = f"{ours}.gate_up_proj.weight"
    yield Entry(f"{theirs}.gate_proj.weight", (width, hidden), gate_up, rows, (0, local_width))
    yield Entry(f"{theirs}.up_proj.weight", (width, hidden), gate_up, rows, (local_width, 2 * local_width))
    yield Entry(f"{theirs}.down_proj.weight", (hidden, width), f"{ours}.down_proj.weight", columns)


class Checkpoint:
    """The tensors of a Hugging Face folder: where each one is, and its parts on request."""

    threads = THREADS

    def __init__(self, folder: str | Path, config: ModelConfig) -> None:
        """Open the files and read their headers, each once. Files that hold only extra tensors may be missing.

        Raises ValueError if a file is missing or broken.
        """
        self.folder = Path(folder)
        index = self.folder / INDEX
        if index.is_file():
            self.shard_of = self._open_indexed(_read_index(index), config)
        else:
            shard = Shard(_single_file(self.folder))
            names = [name for name in shard.tensors if not is_extra(name, config, shard.tensors)]
            self.shard_of = dict.fromkeys(names, shard)

    def _open_indexed(self, files: dict[str, str], config: ModelConfig) -> dict[str, Shard]:
        """Open the shards of an index (tensor -> file name)."""
        files = {name: file for name, file in files.items() if not is_extra(name, config, files)}
        paths = {file: self.folder / file for file in sorted(set(files.values()))}
        complain(self.folder, "shards are missing", [path.name for path in paths.values() if not path.is_file()])
        shards = {file: Shard(path) for file, path in paths.items()}
        absent = [name for name, file in files.items() if name not in shards[file].tensors]
        complain(self.folder, "tensors are missing from the shard that the index names", sorted(absent))
        twice = [name for file, shard in shards.items() for name in shard.tensors if files.get(name, file) != file]
        complain(self.folder, "tensors are in two shards", sorted(twice))
        return {name: shards[file] for name, file in files.items()}

    def stored(self, name: str) -> Stored:
        return self.shard_of[name].tensors[name]

    def dtype(self, entry: Entry) -> torch.dtype:
        return DTYPES[self.stored(entry.name).dtype]

    def read(self, entry: Entry, part: Part, into: Tensor | None = None) -> Tensor:
        """Read a part of a tensor on the host: `into`, if it fits, or a new one. Raises OSError if it cannot."""
        return self.shard_of[entry.name].read(entry.name, part, into)

    def scale(self, entry: Entry, part: Part) -> Tensor:
        """Read the scales of an fp8 tensor's part, as float32: of all blocks that it touches."""
        return self.shard_of[entry.scale_name].read(entry.scale_name, blocks(part)).float()

    def close(self) -> None:
        for shard in set(self.shard_of.values()):
            shard.close()


def blocks(part: Part) -> Part:
    """Return the 128x128 blocks that a part touches, as a part of the scales."""
    assert part.columns is not None
    (top, bottom), (left, right) = part.rows, part.columns
    return Part((top // BLOCK, -(-bottom // BLOCK)), (left // BLOCK, -(-right // BLOCK)))


def open_checkpoint(folder: str | Path, config: ModelConfig) -> Checkpoint:
    """Open a checkpoint that has what `config` asks for.

    Only the files' headers are read, and they bound the time. Raises ValueError with the tensors that are not as
    config.json says.
    """
    checkpoint = Checkpoint(folder, config)
    check_checkpoint(checkpoint, config)
    return checkpoint


def check_checkpoint(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raise ValueError with the tensors that are missing, left over, or not of the right shape or dtype.

    It stops early if config.json asks for more tensors than the files hold.
    """
    folder, names = checkpoint.folder, checkpoint.shard_of
    if config.drafts and not any(name.startswith(mtp_prefix(config)) for name in names):
        raise ValueError(
            f"{folder}: --speculate drafts with the multi-token-prediction layer, but there are no tensors "
            f"{mtp_prefix(config)}*"
        )
    wanted, missing, wrong, formats = set(), {}, [], []
    for entry in checkpoint_table(config):
        wanted.add(entry.name)
        if config.fp8:
            wanted.add(entry.scale_name)
        if entry.name not in names:
            missing[entry.name] = None
        elif (stored := checkpoint.stored(entry.name)).shape != entry.shape:
            wrong.append(f"{entry.name} is {list(stored.shape)}, must be {list(entry.shape)}")
        else:
            formats += _wrong_format(checkpoint, entry)
        if len(missing) > len(names):
            complain(folder, "or more tensors that config.json asks for are missing", list(missing))
    complain(folder, "tensors that config.json asks for are missing", list(missing))
    left_over = [name for name in names if name not in wanted and not (name == HEAD and config.tie_word_embeddings)]
    complain(folder, "tensors are not of this model", sorted(left_over))
    complain(folder, "tensors have another shape than config.json says", wrong)
    complain(folder, "tensors are not in a format that can be loaded", formats)
    if config.tie_word_embeddings and HEAD in names:
        _check_tied(checkpoint, config)


def _wrong_format(checkpoint: Checkpoint, entry: Entry) -> Iterator[str]:
    """Yield what is wrong with the dtype or the scales of a tensor."""
    stored, name, scaled = checkpoint.stored(entry.name), entry.scale_name, entry.scale_name in checkpoint.shard_of
    if stored.dtype not in WEIGHTS:
        yield f"{entry.name} is in {stored.dtype}, must be in {' or '.join(WEIGHTS)}"
    elif stored.dtype != "F8_E4M3":
        if scaled:
            yield f"{entry.name} is in {DTYPES[stored.dtype]}, but there is a {name}"
    elif len(stored.shape) != 2:
        yield f"{entry.name} is in fp8, which only matrices can be"
    elif not scaled:
        yield f"{entry.name} is in fp8, but there is no {name}"
    elif (scale := checkpoint.stored(name)).shape != (expected := tuple(-(-size // BLOCK) for size in entry.shape)):
        yield f"{name} is {list(scale.shape)}, must be {list(expected)}"
    elif scale.dtype not in SCALES:
        yield f"{name} is in {scale.dtype}, must be in {' or '.join(SCALES)}"


def _check_tied(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raise ValueError if there is an LM head beside tied embeddings, and it differs from the embedding.

    Both are read, a few rows at a time.
    """
    rows, columns = config.vocab_size, config.hidden_size
    embedding, head = (Entry(name, (rows, columns), "") for name in (EMBEDDING, HEAD))
    same = checkpoint.stored(HEAD).shape == (rows, columns) and not list(_wrong_format(checkpoint, head))
    step = max(1, 2**22 // columns)
    for first in range(0, rows if same else 0, step):
        part = Part((first, min(first + step, rows)), (0, columns))
        if not torch.equal(checkpoint.read(embedding, part).float(), checkpoint.read(head, part).float()):
            same = False
            break
    if not same:
        raise ValueError(
            f"{checkpoint.folder}: config.json's tie_word_embeddings is true, but {HEAD} is there, and is not equal to "
            f"{EMBEDDING}"
        )


def is_extra(name: str, config: ModelConfig, names: Container[str]) -> bool:
    """Return whether the model ignores this tensor of `names`.

    It ignores three kinds. Multi-token-prediction layers are stored behind the last layer; config.json need not count
    them. If the model drafts with the first of them, only its copies of other tensors are ignored. Old checkpoints have
    rope frequencies. Some tools add scales for a KV cache in fp8, which there is none of.
    """
    if config.drafts and name.startswith(mtp_prefix(config)):
        if name.removeprefix(mtp_prefix(config)).startswith(MTP_COPIES):
            return True
    elif (match := LAYER.match(name)) is not None and (layer := int(match[1])) >= config.num_hidden_layers:
        if layer < config.num_hidden_layers + config.num_nextn_predict_layers:
            return True
        if any(f"model.layers.{layer}.{mark}.weight" in names for mark in MTP_MARKS):
            return True
    return name.endswith(EXTRA_ENDINGS)


def _single_file(folder: Path) -> Path:
    """Return model.safetensors. Raises ValueError with what is there instead."""
    if (single := folder / "model.safetensors").is_file():
        return single
    nothing = f"{folder}: it has neither model.safetensors nor {INDEX}"
    for ending, what in (
        ("safetensors", "whose index is missing"),
        ("gguf", "GGUF is not supported, only safetensors"),
        ("bin", "PyTorch's own format is not supported, only safetensors"),
        ("pt", "PyTorch's own format is not supported, only safetensors"),
        ("pth", "PyTorch's own format is not supported, only safetensors"),
    ):
        if found := sorted(path.name for path in folder.glob(f"*.{ending}")):
            raise ValueError(f"{nothing}, but {len(found)} *.{ending} ({shown(found[0])}): {what}")
    raise ValueError(nothing)


def _read_index(index: Path) -> dict[str, str]:
    """Return each tensor's shard. A shard's path must stay inside the folder, but may be a link to a download cache."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict):
        raise ValueError(f"{index}: weight_map is {shown(files)}; it must be an object")
    inside: set[str] = set()
    for name, shard in files.items():
        if isinstance(shard, str) and shard in inside:
            continue
        if not _stays_inside(shard):
            raise ValueError(f"{index}: the shard of {shown(name)} is {shown(shard)}; it must be a file of this folder")
        inside.add(shard)
    return files


def _stays_inside(shard: Any) -> bool:
    if not isinstance(shard, str):
        return False
    path = PurePosixPath(shard)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts  # "." and "" have no parts


def needed_shards(index: Path, config: ModelConfig) -> list[str]:
    """Return the files of an index that hold a tensor of the model. Raises ValueError if it is none."""
    files = _read_index(index)
    return sorted({file for name, file in files.items() if not is_extra(name, config, files)})


def complain(folder: str | Path, what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        some = "; ".join(name if name.isprintable() and len(name) < 300 else shown(name) for name in names[:4])
        raise ValueError(f"{folder}: {len(names)} {what}: {some}{more}")
