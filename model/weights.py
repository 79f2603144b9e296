"""Weights from a Hugging Face folder, streamed: each rank reads only the bytes of its own tensors.

`checkpoint_table` is the whole mapping: what every tensor is called on disk, the shape it must have, which of our
parameters it fills, and how it is split. The loader checks the checkpoint against it in both directions.

A tensor in block fp8 has its scales beside it, `NAME_scale_inv`. Where the parameter is fp8 too, both are copied as
they are, always together; elsewhere the tensor is dequantised on the way.
"""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels.fp8 import BLOCK, dequantize_128x128
from model.config import ModelConfig
from model.layers import FP8
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
            value, scale = stored[share], None
            if value.dtype == FP8:
                scale = _read_scale(folder, entry, files, opened)
            if targets[0].dtype == FP8:
                if scale is None:
                    raise ValueError(f"{folder}: {entry.name} is in {value.dtype}, not in fp8 as config.json says")
                blocks = replace(entry, rows=_blocks(*entry.rows))
                places = _targets(parameters[f"{entry.parameter}_scale_inv"], blocks, model.placement, mesh)
                for place in places:
                    place.copy_(scale[tuple(slice(*_blocks(part.start, part.stop)) for part in share)])
            elif scale is not None:
                value = dequantize_128x128(value, scale, *(part.start or 0 for part in (*share, slice(0))[:2]))
            for target in targets:
                target.copy_(value)
    _complain(folder, "tensors have the wrong shape", wrong)


def _blocks(first: int | None, end: int | None) -> tuple[int, int | None]:
    """The blocks of a part that begins with a whole one."""
    return (first or 0) // BLOCK, None if end is None else -(-end // BLOCK)


def _read_scale(folder: str | Path, entry: Entry, files: dict[str, Path], opened: dict[Path, safe_open]) -> Tensor:
    if entry.scale_name not in files:
        raise ValueError(f"{folder}: {entry.name} is in fp8, but there is no {entry.scale_name}")
    scale = opened[files[entry.scale_name]].get_tensor(entry.scale_name)
    expected = tuple(-(-size // BLOCK) for size in entry.shape)
    if tuple(scale.shape) != expected:
        raise ValueError(f"{folder}: {entry.scale_name} is {list(scale.shape)}, must be {list(expected)}")
    return scale


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
