"""A checkpoint on disk: its tensors' names and shapes, and the parameters of ours that they fill.

`checkpoint_table` is the whole mapping. `check_checkpoint` compares the files with it, in both directions. It reads
only the files' headers. It runs before the model is made, so a size that config.json wrongly claims costs no memory.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from model.config import ModelConfig, read_json, shown

INDEX = "model.safetensors.index.json"


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


@dataclass(frozen=True)
class Stored:
    """A stored tensor: its file and its shape."""

    path: Path
    shape: tuple[int, ...]


def check_checkpoint(folder: str | Path, config: ModelConfig) -> dict[str, Path]:
    """Return the file of each tensor, by name. Raises ValueError with the tensors that are not as `config` says.

    It stops early if config.json asks for more tensors than the files hold.
    """
    stored = read_headers(Path(folder))
    wanted, missing, wrong = set(), {}, []
    for entry in checkpoint_table(config):
        wanted.add(entry.name)
        if config.fp8:
            wanted.add(entry.scale_name)
        if entry.name not in stored:
            missing[entry.name] = None
        elif stored[entry.name].shape != entry.shape:
            wrong.append(f"{entry.name} is {list(stored[entry.name].shape)}, must be {list(entry.shape)}")
        if len(missing) > len(stored):
            complain(folder, "or more tensors that config.json asks for are missing", list(missing))
    complain(folder, "tensors that config.json asks for are missing", list(missing))
    left_over = [name for name in stored if name not in wanted and not _is_known_extra(name, config)]
    complain(folder, "tensors are not of this model", sorted(left_over))
    complain(folder, "tensors have another shape than config.json says", wrong)
    return {name: at.path for name, at in stored.items()}


def _is_known_extra(name: str, config: ModelConfig) -> bool:
    """Return whether the model ignores this tensor.

    It ignores multi-token-prediction layers, which are stored after the last layer, and old checkpoints' rope
    frequencies.
    """
    match = re.match(r"model\.layers\.(\d+)\.", name)
    last = config.num_hidden_layers + config.num_nextn_predict_layers
    if match is not None and config.num_hidden_layers <= int(match[1]) < last:
        return True
    return name.endswith("rotary_emb.inv_freq")


def read_headers(folder: Path) -> dict[str, Stored]:
    """Locate every tensor that the index names, or that the single file holds.

    Raises ValueError if a file is missing or not whole.
    """
    if not (folder / INDEX).is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise ValueError(f"{folder}: it has neither model.safetensors nor {INDEX}")
        return _read_header(single)
    files = _read_index(folder / INDEX)
    complain(folder, "shards are missing", sorted({path.name for path in files.values() if not path.is_file()}))
    headers = {path: _read_header(path) for path in sorted(set(files.values()))}
    absent = [name for name, path in files.items() if name not in headers[path]]
    complain(folder, "tensors are missing from the shard that the index names", sorted(absent))
    return {name: headers[path][name] for name, path in files.items()}


def _read_index(index: Path) -> dict[str, Path]:
    """Return each tensor's shard. A shard's path must stay inside the folder, but may be a link to a download cache."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict):
        raise ValueError(f"{index}: weight_map is {shown(files)}; it must be an object")
    for name, shard in files.items():
        if not _stays_inside(shard):
            raise ValueError(f"{index}: the shard of {shown(name)} is {shown(shard)}; it must be a file of this folder")
    return {name: index.parent / shard for name, shard in files.items()}


def _stays_inside(shard: Any) -> bool:
    return isinstance(shard, str) and not PurePosixPath(shard).is_absolute() and ".." not in PurePosixPath(shard).parts


def _read_header(path: Path) -> dict[str, Stored]:
    with open_shard(path) as file:
        return {name: Stored(path, tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118


def open_shard(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


def complain(folder: str | Path, what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise ValueError(f"{folder}: {len(names)} {what}: {'; '.join(names[:4])}{more}")
