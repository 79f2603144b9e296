"""A rank's parameters are its own shares of the checkpoint's tensors. A tensor that does not fit is refused by name."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from disagg.config import EngineConfig
from disagg.engine import Engine
from disagg.memory import check_weights
from kernels.ops import Ops
from model.checkpoint import THREADS, Checkpoint, Entry, checkpoint_table, open_checkpoint
from model.config import ModelConfig
from model.footprint import StepShape
from model.shard import Shard
from model.weights import Piece, _pieces
from parallel.mesh import Group, Mesh
from parallel.placement import Placement
from tests import hf

GATE = "model.layers.2.mlp.gate.weight"
EXPERT = "model.layers.3.mlp.experts.5.down_proj.weight"
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf.save(tmp_path_factory.mktemp("single"), "v3")


@pytest.fixture(scope="module")
def saved_sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = hf.save(tmp_path_factory.mktemp("sharded"), "v3", max_shard_size="400KB")
    assert (folder / INDEX).is_file()
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


@pytest.fixture
def single(saved: Path, tmp_path: Path) -> Path:
    """A copy that the test may spoil."""
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def sharded(saved_sharded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved_sharded, tmp_path / "model")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object], file: str = FILE) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)


def reconfigure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path, *names: str, count: int | None = None) -> None:
    """Loading says ValueError, and its message names all of `names`."""
    with pytest.raises(ValueError) as error:
        hf.load(folder)
    assert all(name in str(error.value) for name in names), str(error.value)
    if count is not None:
        assert f"{count} tensors" in str(error.value)


def assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    one, two = dict(a.named_parameters()), dict(b.named_parameters())
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_a_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "no such folder")


def test_a_folder_without_config(single: Path) -> None:
    (single / "config.json").unlink()
    refused(single, str(single), "config.json")


def test_a_config_that_is_not_json(single: Path) -> None:
    (single / "config.json").write_text('{"model_type": ')
    refused(single, "config.json", "not JSON")


def test_an_unsupported_model_type(single: Path) -> None:
    reconfigure(single, model_type="llama")
    refused(single, "model_type", "'llama'", "deepseek_v3")


def test_a_folder_without_weights(single: Path) -> None:
    (single / FILE).unlink()
    refused(single, str(single), FILE, INDEX)


@pytest.mark.parametrize("keep", [0, 5, 1000, -1], ids=["empty", "no header", "half a header", "one byte short"])
def test_a_truncated_file(single: Path, keep: int) -> None:
    (single / FILE).write_bytes((single / FILE).read_bytes()[:keep])
    refused(single, FILE, "not a whole safetensors file")


def test_a_truncated_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(sharded, shard.name, "not a whole safetensors file")


def test_a_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refused(sharded, shard.name, "missing")


@pytest.mark.parametrize("text", ["{", "{}", "[]"], ids=["not JSON", "no weight_map", "a list"])
def test_an_index_that_is_none(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    refused(sharded, INDEX)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/dev/zero", "a/../../b", ".", "", 5, None])
def test_an_index_that_leaves_its_folder(sharded: Path, shard: object) -> None:
    shutil.copy(next(sharded.glob("*.safetensors")), sharded.parent / "outside.safetensors")
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][EXPERT] = shard
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, INDEX, EXPERT, repr(shard), "must be a file of this folder")


def test_shards_may_be_links_out_of_the_folder(sharded: Path, saved: Path) -> None:
    """As in a download cache, whose snapshots are links to `../../blobs`."""
    (sharded.parent / "blobs").mkdir()
    for number, shard in enumerate(sorted(sharded.glob("*.safetensors"))):
        shard.rename(sharded.parent / "blobs" / str(number))
        shard.symlink_to(f"../blobs/{number}")
    assert_same(hf.load(sharded), hf.load(saved))


SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("n_routed_experts", "n_shared_experts", "first_k_dense_replace"),
)


@pytest.mark.parametrize("size", [10**6, 2 * 10**9])
@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_only_the_config_has_is_refused_before_it_takes_memory(
    saved: Path, name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is not even begun, and the table is walked only as far as the file is large."""

    def no_model(*args: object) -> None:
        raise AssertionError("the model must not be made")

    def counting(config: ModelConfig) -> Iterator[Entry]:
        for entry in checkpoint_table(config):
            visited.append(entry)
            yield entry

    visited: list[Entry] = []
    monkeypatch.setattr("disagg.engine.Transformer", no_model)
    monkeypatch.setattr("disagg.engine.make_placement", no_model)
    monkeypatch.setattr("model.checkpoint.checkpoint_table", counting)
    config = replace(ModelConfig.from_pretrained(saved), **{name: size})
    with pytest.raises(ValueError, match=rf"{saved}: \d+ (or more )?tensors (that config.json|have another shape)"):
        Engine.from_pretrained(EngineConfig(max_model_len=256), config, saved, Mesh(), Ops())
    assert len(visited) <= 2 * len(load_file(saved / FILE)) + 1


def test_a_tensor_that_its_shard_does_not_hold(sharded: Path) -> None:
    shard = json.loads((sharded / INDEX).read_text())["weight_map"][EXPERT]
    rewrite(sharded, lambda tensors: tensors.pop(EXPERT), shard)
    refused(sharded, EXPERT, "missing", count=1)


@pytest.mark.parametrize("name", [GATE, EXPERT, "lm_head.weight", "model.layers.0.self_attn.q_b_proj.weight"])
def test_a_missing_tensor(single: Path, name: str) -> None:
    rewrite(single, lambda tensors: tensors.pop(name))
    refused(single, name, "missing", count=1)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.weight", GATE + "_scale_inv", "model.layers.4.input_layernorm.weight"]
)
def test_a_leftover_tensor(single: Path, name: str) -> None:
    rewrite(single, lambda tensors: tensors.update({name: torch.ones(3)}))
    refused(single, name, "not of this model", count=1)


@pytest.mark.parametrize("name", [EXPERT, GATE, "model.embed_tokens.weight", "model.layers.1.self_attn.o_proj.weight"])
def test_a_tensor_of_the_wrong_shape(single: Path, name: str) -> None:
    shape: list[int] = []

    def transpose(tensors: dict[str, Tensor]) -> None:
        shape.extend(tensors[name].shape)
        tensors[name] = tensors[name].T

    rewrite(single, transpose)
    refused(single, name, str(shape), str(shape[::-1]), count=1)


def test_many_wrong_tensors_are_counted_and_some_named(single: Path) -> None:
    names = [f"model.layers.2.mlp.experts.{e}.up_proj.weight" for e in range(10, 16)]
    rewrite(single, lambda tensors: [tensors.pop(name) for name in names])
    refused(single, names[0], "2 more", count=6)


MTP = ("eh_proj.weight", "enorm.weight", "mlp.experts.0.down_proj.weight", "shared_head.head.weight")


@pytest.mark.parametrize("count", [0, 1, None])
def test_multi_token_prediction_layers_are_skipped_whatever_the_config_says_of_them(
    single: Path, saved: Path, count: int | None
) -> None:
    reconfigure(single, num_nextn_predict_layers=count)
    extra = {f"model.layers.4.{name}": torch.ones(2, 2) for name in MTP}
    rewrite(single, lambda tensors: tensors.update(extra))
    assert_same(hf.load(single), hf.load(saved))


def test_a_layer_that_only_the_file_has_is_refused(single: Path) -> None:
    """A num_hidden_layers that is too small would serve half a model: nothing marks these layers as extra."""
    reconfigure(single, num_hidden_layers=3)
    refused(single, "model.layers.3.", "not of this model", "more")


def test_only_the_shard_of_the_extra_layer_may_be_missing(sharded: Path, saved: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] |= {f"model.layers.4.{name}": "mtp.safetensors" for name in MTP}
    (sharded / INDEX).write_text(json.dumps(index))
    assert_same(hf.load(sharded), hf.load(saved))
    index["weight_map"][GATE] = "mtp.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, "1 shards are missing: mtp.safetensors")


@pytest.mark.parametrize("name", ["rotary_emb.inv_freq", "attn.k_scale", "attn.v_scale", "attn.q_scale"])
def test_what_other_tools_add_is_skipped(single: Path, saved: Path, name: str) -> None:
    rewrite(single, lambda tensors: tensors.update({f"model.layers.0.self_attn.{name}": torch.ones(4)}))
    assert_same(hf.load(single), hf.load(saved))


def test_shards_load_as_one_file_does(saved: Path, saved_sharded: Path) -> None:
    assert_same(hf.load(saved), hf.load(saved_sharded))


def test_every_parameter_is_filled(saved: Path) -> None:
    """The numbers of the file and of the model are the same: none is lost, none is left as it was allocated."""
    stored = torch.cat([t.flatten() for t in load_file(saved / FILE).values()])
    loaded = torch.cat([p.flatten() for p in hf.load(saved).parameters()])
    assert torch.equal(loaded.sort().values, stored.sort().values)


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    folder = hf.save(tmp_path, "one_dense")
    tensors = load_file(folder / FILE)
    assert "lm_head.weight" not in tensors
    model = hf.load(folder)
    assert torch.equal(model.head.lm_head.weight, tensors["model.embed_tokens.weight"])
    assert torch.equal(model.embed_tokens.weight, tensors["model.embed_tokens.weight"])


def test_a_head_beside_tied_embeddings_must_equal_them(tmp_path: Path) -> None:
    folder = hf.save(tmp_path, "one_dense")
    plain, name = hf.load(folder), "lm_head.weight"
    embedding = load_file(folder / FILE)["model.embed_tokens.weight"]
    rewrite(folder, lambda tensors: tensors.update({name: embedding.clone()}))
    assert_same(hf.load(folder), plain)
    for wrong in (embedding[:-1], embedding.int(), torch.cat((embedding[:-1], embedding[-1:] + 1))):
        rewrite(folder, lambda tensors, head=wrong: tensors.update({name: head}))
        refused(folder, "tie_word_embeddings", name, "is not equal to model.embed_tokens.weight")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float64, torch.float8_e5m2, torch.float8_e8m0fnu])
def test_a_tensor_of_another_dtype(single: Path, dtype: torch.dtype) -> None:
    rewrite(single, lambda tensors: tensors.update({EXPERT: torch.ones_like(tensors[EXPERT]).to(dtype)}))
    refused(single, f"{EXPERT} is in ", "must be in BF16 or F16 or F32 or F8_E4M3", count=1)


def test_fp8_without_scales(single: Path) -> None:
    rewrite(single, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].to(torch.float8_e4m3fn)}))
    refused(single, f"{EXPERT} is in fp8, but there is no {EXPERT}_scale_inv", count=1)


@pytest.mark.parametrize(
    "files, what",
    [
        (
            ["model-00001-of-00002.safetensors", "x"],
            "1 *.safetensors ('model-00001-of-00002.safetensors'): whose index",
        ),
        (["a.gguf", "b.gguf"], "2 *.gguf ('a.gguf'): GGUF is not supported, only safetensors"),
        (["pytorch_model.bin"], "('pytorch_model.bin'): PyTorch's own format is not supported, only safetensors"),
        ([], f"it has neither {FILE} nor {INDEX}"),
    ],
)
def test_other_files_than_safetensors_and_an_index(single: Path, files: list[str], what: str) -> None:
    (single / FILE).unlink()
    for name in files:
        (single / name).touch()
    refused(single, f"{single}: it has neither", what)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    shards = {shard.name: load_file(shard) for shard in sorted(sharded.glob("*.safetensors"))}
    home = next(name for name, tensors in shards.items() if EXPERT in tensors)
    other = next(name for name in shards if name != home)
    rewrite(sharded, lambda tensors: tensors.update({EXPERT: torch.ones(1)}), other)
    refused(sharded, EXPERT, "in two shards", count=1)


def test_names_from_a_file_stay_on_one_line(single: Path) -> None:
    rewrite(single, lambda tensors: tensors.update({"a\nb" + "x" * 10**5: torch.ones(1)}))
    with pytest.raises(ValueError, match="1 tensors are not of this model: 'a.nbxx") as error:
        hf.load(single)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


# Loading.


@pytest.mark.parametrize("shape", ["v3", "no_q_lora"])
@pytest.mark.parametrize("attn_tp", [1, 2])
def test_a_rank_of_four_reads_the_bytes_of_its_own_entries(
    shape: str, attn_tp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing twice: counted where the system is asked for bytes."""
    folder, read = hf.save(tmp_path, shape), []
    config = ModelConfig.from_pretrained(folder)

    def counted(number: int, rooms: list[memoryview], offset: int) -> int:
        read.append((offset, offset + (count := os_preadv(number, rooms, offset))))
        return count

    os_preadv = os.preadv
    monkeypatch.setattr("os.preadv", counted)
    for rank in range(4):
        read.clear()
        hf.load(folder, Mesh(rank=rank, size=4, attn=Group(attn_tp, rank % attn_tp), ep=Group(4, rank)))
        own = 0
        for entry in checkpoint_table(config, attn_tp):
            if entry.expert is None or entry.expert // 4 == rank:
                own += 4 * prod(entry.shape) // (attn_tp if entry.split is not None else 1)
        assert sum(end - first for first, end in read) == own
        assert all(one[1] <= other[0] for one, other in pairwise(sorted(read))), "read twice"


@pytest.mark.parametrize("shape", ["v3", "one_dense"])
def test_pieces_make_the_whole(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, stored = hf.save(tmp_path, shape, vocab_size=400, intermediate_size=300), []
    for at, size in enumerate((10**9, 1)):  # bytes: all at once, and 128 rows at a time
        monkeypatch.setattr("model.weights.PIECE_BYTES", size)
        meshes = [Mesh(rank=r, size=2, attn=Group(2, r), ep=Group(2, r)) for r in range(2)]
        stored.append([hf.load(folder, mesh) for mesh in [Mesh(), *meshes]])
        pieces = list(_pieces(stored[-1][0], open_checkpoint(folder, stored[-1][0].config), Mesh()))
        assert (len(pieces) > sum(1 for _ in checkpoint_table(stored[-1][0].config))) == (at == 1)
    for one, other in zip(*stored, strict=True):
        assert_same(one, other)


def test_ctrl_c_ends_the_loading_after_the_pieces_in_flight(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Piece] = []

    def slow(piece: Piece, source: object) -> None:
        loaded.append(piece)
        if len(loaded) == 1:
            signal.raise_signal(signal.SIGINT)  # the main thread hears it, and waits for this one
        time.sleep(0.05)

    monkeypatch.setattr(Piece, "load", slow)
    with pytest.raises(KeyboardInterrupt):
        hf.load(single)
    assert 1 <= len(loaded) <= 4 * THREADS


def test_few_tensors_are_in_memory_at_once(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most a piece per thread: bfloat16 files make a copy of each."""
    rewrite(single, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    running, most, lock, load = set(), [], threading.Lock(), Piece.load

    def watched(piece: Piece, source: object) -> None:
        with lock:
            running.add(id(piece))
            most.append(len(running))
        load(piece, source)
        with lock:
            running.discard(id(piece))

    monkeypatch.setattr(Piece, "load", watched)
    hf.load(single)
    assert len(most) == sum(1 for _ in checkpoint_table(ModelConfig.from_pretrained(single)))
    assert max(most) <= THREADS


def test_a_file_that_ends_while_it_is_read_is_an_error_on_all_ranks(single: Path) -> None:
    """Here on the only one; the others are told by `exchange`."""
    config, checkpoint = ModelConfig.from_pretrained(single), open_checkpoint

    def shrunk(folder: Path, config: ModelConfig) -> Checkpoint:
        opened = checkpoint(folder, config)
        os.truncate(folder / FILE, 5000)
        return opened

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("disagg.engine.open_checkpoint", shrunk)
        with pytest.raises(ValueError, match=f"--model {single}: {single / FILE}: it has changed since it was opened"):
            Engine.from_pretrained(EngineConfig(max_model_len=256, kv_tokens=256), config, single, Mesh(), Ops())


V3 = {  # DeepSeek-V3's config.json
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "kv_lora_rank": 512,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip


def write_sparse(folder: Path, shards: int) -> ModelConfig:
    """Write 671 billion zeros that take no space on the disk: the headers of fp8 shards, and a hole behind each."""
    (folder / "config.json").write_text(json.dumps(V3))
    config, headers, sizes, index = ModelConfig.from_pretrained(folder), [{} for _ in range(shards)], [0] * shards, {}
    for number, entry in enumerate(checkpoint_table(config)):
        shard = number * shards // 45_500
        tensors = [(entry.name, entry.shape, "F8_E4M3" if "_proj" in entry.name else "BF16")]
        if "_proj" in entry.name:
            tensors.append((entry.scale_name, [-(-size // 128) for size in entry.shape], "F32"))
        for name, shape, dtype in tensors:
            end = sizes[shard] + prod(shape) * {"F8_E4M3": 1, "BF16": 2, "F32": 4}[dtype]
            headers[shard][name] = {"dtype": dtype, "shape": shape, "data_offsets": [sizes[shard], end]}
            index[name], sizes[shard] = f"model-{shard}.safetensors", end
    for shard, (header, size) in enumerate(zip(headers, sizes, strict=True)):
        text = json.dumps(header).encode()
        with open(folder / f"model-{shard}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + size)
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    return config


def test_a_checkpoint_of_671_billion_parameters_is_checked_without_reading_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, opened = write_sparse(tmp_path, 163), []
    monkeypatch.setattr("os.preadv", None)  # what reads tensors
    read = Shard._read_header
    monkeypatch.setattr(Shard, "_read_header", lambda shard: opened.append(shard.path) or read(shard))
    began = time.process_time()
    checkpoint = open_checkpoint(tmp_path, config)
    assert time.process_time() - began < 10, "seconds of CPU; about 1 on an idle core"
    assert len(opened) == len(set(opened)) == 163
    assert len(checkpoint.shard_of) > 90_000
    assert sum(prod(checkpoint.stored(name).shape) for name in checkpoint.shard_of if "_scale_inv" not in name) > 671e9
    with pytest.raises(ValueError, match=r"memory: the weights of one rank, attention .* GiB, are over the .* GiB av"):
        check_weights(Mesh(), StepShape(config, itemsize=2, slots=256))


def test_bfloat16_files_load_into_float32_models(single: Path) -> None:
    rewrite(single, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    stored, model = load_file(single / FILE), hf.load(single)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(model.head.lm_head.weight, stored["lm_head.weight"].float())


def slot_of(tensors: dict[str, Tensor], layer: int, expert: int) -> tuple[Tensor, Tensor]:
    """What a slot holds: gate's rows and then up's, and down."""
    gate, up, down = (
        tensors[f"model.layers.{layer}.mlp.experts.{expert}.{n}_proj.weight"] for n in ("gate", "up", "down")
    )
    return torch.cat((gate, up)), down


@pytest.mark.parametrize("rank", range(4))
def test_an_expert_rank_reads_its_own_experts_only(single: Path, saved: Path, rank: int) -> None:
    """Every other expert in its file is NaN."""
    mine = range(4 * rank, 4 * rank + 4)

    def poison(tensors: dict[str, Tensor]) -> None:
        others = [n for n in tensors if ".experts." in n and int(n.split(".experts.")[1].split(".")[0]) not in mine]
        assert len(others) == 12 * 3 * 2  # experts x matrices x layers
        for name in others:
            tensors[name].fill_(float("nan"))

    rewrite(single, poison)
    model, stored = hf.load(single, Mesh(rank=rank, size=4, ep=Group(4, rank))), load_file(saved / FILE)
    whole = dict(hf.load(saved).named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if ".experts." not in name:
            assert torch.equal(parameter, whole[name]), name
    for layer in (2, 3):
        experts = model.layers[layer].mlp.experts
        assert len(experts.gate_up_proj) == len(experts.down_proj) == 4
        for slot, expert in enumerate(mine):
            gate_up, down = slot_of(stored, layer, expert)
            assert torch.equal(experts.gate_up_proj[slot], gate_up)
            assert torch.equal(experts.down_proj[slot], down)


def test_a_placement_decides_which_slots_an_expert_fills(saved: Path) -> None:
    """Two replicas of expert 3, another order in each layer, 5 slots on each of 4 ranks."""
    tables = torch.stack([torch.cat((torch.randperm(16), torch.tensor([3, 7, 7, 1]))) for _ in range(2)])
    placement = replace(Placement.identity(2, 16, 4), expert_of_slot=tables)
    stored = load_file(saved / FILE)
    for rank in range(4):
        model = hf.load(saved, Mesh(rank=rank, size=4, ep=Group(4, rank)), placement)
        for layer in (2, 3):
            experts = model.layers[layer].mlp.experts
            assert len(experts.gate_up_proj) == 5
            for slot in range(5):
                gate_up, down = slot_of(stored, layer, int(tables[layer - 2, rank * 5 + slot]))
                assert torch.equal(experts.gate_up_proj[slot], gate_up)
                assert torch.equal(experts.down_proj[slot], down)


SPLIT_ROWS = ("lm_head", "q_b_proj", "kv_b_proj")  # whole heads, or tokens of the vocabulary


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("shape", ["v3", "no_q_lora"])
def test_attention_shards_concatenate_to_the_whole_tensors(shape: str, size: int, tmp_path: Path) -> None:
    folder = hf.save(tmp_path, shape)
    ranks = [hf.load(folder, Mesh(rank=r, size=size, attn=Group(size, r), ep=Group(size, r))) for r in range(size)]
    shards = [dict(model.named_parameters()) for model in ranks]
    split = 0
    for name, whole in hf.load(folder).named_parameters():
        parts = [shard[name] for shard in shards]
        kind = name.split(".")[-2]
        is_dense = "mlp.gate_up_proj.weight" in name or "mlp.down_proj.weight" in name
        if kind == "qkv_a_proj" and ranks[0].config.q_lora_rank is None:  # heads below which every rank has the rest
            rest = ranks[0].config.kv_dim
            assert all(torch.equal(part[-rest:], whole[-rest:]) for part in parts), name
            parts, whole = [part[:-rest] for part in parts], whole[:-rest]
            together = torch.cat(parts)
        elif name.endswith(("experts.gate_up_proj", "experts.down_proj")) or kind in SPLIT_ROWS:
            together = torch.cat(parts)
        elif is_dense and kind == "gate_up_proj":
            together = torch.cat([part.chunk(2)[half] for half in range(2) for part in parts])
        elif kind == "o_proj" or is_dense:
            together = torch.cat(parts, 1)
        else:
            assert all(torch.equal(part, whole) for part in parts), name
            continue
        split += 1
        assert torch.equal(together, whole), name
        assert all(part.numel() * size == whole.numel() for part in parts), name
    config = ranks[0].config
    per_attention = 3  # q, kv_b, o
    assert split == 1 + per_attention * config.num_hidden_layers + 2 * config.num_hidden_layers
