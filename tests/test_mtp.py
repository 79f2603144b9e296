"""The multi-token-prediction layer: its drafts equal transformers' on any ranks. How often the shipped one is right."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from disagg.front.tokenizer import load_tokenizer
from kernels.fp8 import dequantize_128x128
from kernels.ops import Ops
from model.batch import Batch, Chunk
from model.checkpoint import open_checkpoint
from model.config import ModelConfig
from model.kv_cache import make_pool
from model.pages import pages_for
from model.transformer import Transformer
from model.weights import DummyWeights, load_weights
from parallel.dispatchers import Dispatcher, plain_dispatchers
from parallel.mesh import Mesh
from parallel.placement import Placement
from scripts.tools.quantize import quantize_folder
from tests import hf
from tests.conftest import ROOT
from tests.worlds import run_world, sub_mesh

DOMAINS = ("bible", "python", "wordnet")  # of docs/prompts.jsonl, four prompts each
LENGTH = 90  # tokens: two pages


def text_of(vocab_size: int) -> list[int]:
    return torch.randint(vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(2)).tolist()


@torch.inference_mode()
def our_drafts(model: Transformer, text: list[int], chunk: int, dispatcher: Dispatcher, attn_tp: int = 1) -> Tensor:
    """Return logits [tokens, V]: row p, from the true tokens up to p + 1, is for the token at p + 2.

    One more row follows: the layer applied again, to its own output and its own first choice.
    """
    pages = range(1, pages_for(LENGTH + 1) + 1)
    pool = make_pool(model.config, len(pages) + 1, torch.float32, "cpu")
    rows, known = [], text[:-1]
    for at in range(0, len(known), chunk):
        ids, following = known[at : at + chunk], text[at + 1 : at + chunk + 1]
        batch = Batch.build([], [Chunk(ids, at, pages)], "cpu", attn_tp)
        hidden = model.head.norm(model.body(batch, pool, dispatcher))
        pads = [0] * (batch.num_tokens - len(ids))
        shifted = replace(batch, token_ids=torch.tensor(pads + following))
        out = model.draft(hidden, shifted, pool, dispatcher)
        rows.append(model.head.project(out[len(pads) :]))
    again = Batch.build([Chunk([int(rows[-1][-1].argmax())], len(known), pages)], [], "cpu", attn_tp)
    state = out[-1:].expand(again.num_tokens, -1)
    rows.append(model.head.project(model.draft(state, again, pool, dispatcher))[:1])
    return torch.cat(rows)


@torch.inference_mode()
def their_drafts(folder: Path, text: list[int]) -> Tensor:
    """The same, from transformers' own layer."""
    from transformers import DeepseekV3ForCausalLM
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    layer = ModelConfig.from_pretrained(folder).num_hidden_layers

    class Theirs(DeepseekV3ForCausalLM):
        _keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layer}\."]

    main = Theirs.from_pretrained(folder, dtype=torch.float32).eval()
    mtp = MtpModel.from_pretrained(main).float().eval()
    ids, cache = torch.tensor([text]), MtpCache(config=main.config.get_mtp_config())
    hidden = main.model(ids[:, :-1]).last_hidden_state
    positions = torch.arange(1, len(text))[None]  # theirs are those of the following tokens, ours those of the hidden
    hidden = mtp.forward_layer(0, hidden, positions, cache, input_ids=ids[:, 1:])
    rows = mtp._project_to_logits(hidden)[0]
    choice = rows[-1:].argmax(-1)[None]
    again = mtp.forward_layer(0, hidden[:, -1:], positions[:, -1:] + 1, cache, input_ids=choice)
    return torch.cat((rows, mtp._project_to_logits(again)[0]))


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf.save_with_mtp(tmp_path_factory.mktemp("mtp"), "v3")


@pytest.mark.parametrize("shape", ["v3", "no_q_lora", "top_8", "one_dense", "no_dense", "shipped"])
def test_drafts_equal_transformers(shape: str, tmp_path: Path, tiny: Path) -> None:
    """Whole prompts and chunks of 7; the layer applied to the main model's output, and again to its own."""
    folder = tiny if shape == "shipped" else hf.save_with_mtp(tmp_path, shape)
    model = hf.load(folder, drafts=True)
    text = text_of(model.config.vocab_size)
    theirs = their_drafts(folder, text).log_softmax(-1)
    assert theirs.std(0).mean() > 0.1, "logits that are all alike would hide mistakes"
    for chunk in (LENGTH, 7):
        ours = our_drafts(model, text, chunk, hf.dispatchers(model)[0]).log_softmax(-1)
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 1e-4, f"{chunk=}"


def on_ranks(rank: int, folder: Path, expected: Tensor) -> None:
    """Jobs of two and four ranks, with attention TP and with copies of experts. The other layers have another map."""
    config = ModelConfig.from_pretrained(folder)
    for ranks, attn_tp, slots in ((2, 1, 16), (2, 2, 20), (4, 2, 16), (4, 1, 20)):
        mesh = sub_mesh(0, ranks, attn_tp)
        if mesh is None:
            continue
        places = torch.arange(slots).remainder(16).flip(0).repeat(config.num_moe_layers, 1)
        model = hf.load(folder, mesh, Placement.of_map(places, 16, ranks, mesh.rank), drafts=True)
        dispatcher = plain_dispatchers(mesh.ep, slots, Ops())[0]
        text = text_of(config.vocab_size)
        got = our_drafts(model, text, 30, dispatcher, attn_tp)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_ranks_that_share_the_layer_draft_as_one_does(random_folder: Path) -> None:
    model = hf.load(random_folder, drafts=True)
    expected = our_drafts(model, text_of(model.config.vocab_size), 30, hf.dispatchers(model)[0])
    run_world(4, on_ranks, random_folder, expected, timeout_s=100)


def test_an_fp8_checkpoint_drafts_as_what_it_dequantises_to(tiny: Path, tmp_path: Path) -> None:
    """Its projections and experts have scales; eh_proj is in bf16, as DeepSeek ships it."""
    quantize_folder(tiny, tmp_path / "fp8")
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    scaled = {name for name in stored if f"{name}_scale_inv" in stored}
    assert "model.layers.5.self_attn.o_proj.weight" in scaled and "model.layers.5.eh_proj.weight" not in scaled
    plain = {name: tensor for name, tensor in stored.items() if not name.endswith("_scale_inv")}
    plain |= {name: dequantize_128x128(stored[name], stored[f"{name}_scale_inv"]) for name in scaled}
    shutil.copytree(tiny, tmp_path / "plain")
    save_file(plain, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    ours, want = (hf.load(tmp_path / kind, drafts=True) for kind in ("fp8", "plain"))
    assert ours.config.fp8 and not want.config.fp8 and ours.mtp is not None and want.mtp is not None
    for (name, weight), other in zip(ours.mtp.named_parameters(), want.mtp.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_a_checkpoint_without_the_layer_is_one_clear_line(random_folder: Path, tmp_path: Path) -> None:
    config = ModelConfig.from_pretrained(random_folder)
    with pytest.raises(ValueError, match="--speculate: config.json's num_nextn_predict_layers is 0 or missing"):
        replace(config, num_nextn_predict_layers=0).drafting()
    dense = replace(config, first_k_dense_replace=config.num_hidden_layers)
    with pytest.raises(ValueError, match="--speculate: the model has no layer with experts"):
        dense.drafting()
    folder = shutil.copytree(random_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    own = {name for name in tensors if name.startswith("model.layers.4.")}
    bare = {name: tensor for name, tensor in tensors.items() if name not in own}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"--speculate drafts .* but there are no tensors model\.layers\.4\.\*"
    ) as error:
        open_checkpoint(folder, config.drafting())
    assert "\n" not in str(error.value)
    for name in ("enorm.weight", "mlp.experts.3.up_proj.weight"):
        less = {other: tensor for other, tensor in tensors.items() if other != f"model.layers.4.{name}"}
        save_file(less, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=rf"1 tensors that config.json asks for are missing: model\.layers\.4\.{name}"
        ):
            open_checkpoint(folder, config.drafting())
        open_checkpoint(folder, config).close()  # who does not draft need not have them


@torch.inference_mode()
@pytest.mark.parametrize("fp8", [False, True])
def test_filling_writes_the_kv_that_drafting_writes(tiny: Path, fp8: bool) -> None:
    """To the last bit, for chunks of prompts, several tokens of each sequence, and padding."""
    config = ModelConfig.from_pretrained(tiny).drafting()
    if fp8:  # widths of whole blocks
        config = replace(config, q_lora_rank=128, kv_lora_rank=112, qk_nope_head_dim=48, moe_intermediate_size=128)
    dtype, placement = (torch.bfloat16 if fp8 else torch.float32), Placement.identity(4, config.n_routed_experts, 1)
    model = Transformer(config, Mesh(), placement, Ops(), dtype, 256, fp8)
    for weight in model.parameters():
        weight.copy_(torch.rand(weight.shape).sub(0.5).to(weight.dtype))
    ids = torch.arange(9) * 31
    prompts = Batch.build([], [Chunk(range(40), 50, [1, 3]), Chunk(range(7), 0, [2])], "cpu")
    decodes = Batch.decode(ids, torch.tensor([62, 63, 64] * 3), torch.tensor([[4, 5], [6, 7], [0, 0]]).int())
    before = make_pool(config, 8, dtype, "cpu").normal_(generator=torch.Generator().manual_seed(1))
    contiguous, masked = hf.dispatchers(model)
    for batch, dispatcher in (
        (decodes, masked), (prompts, contiguous), (Batch.join(decodes, prompts), contiguous)
    ):  # fmt: skip
        hidden = torch.randn(batch.num_tokens, config.hidden_size, generator=torch.Generator().manual_seed(2)).to(dtype)
        drafted, filled = before.clone(), before.clone()
        model.draft(hidden, batch, drafted, dispatcher)
        model.fill_draft(hidden, batch, filled)
        assert torch.equal(filled, drafted) and torch.equal(filled[:-1], before[:-1])
        rows = (filled[-1] != before[-1]).any(-1).flatten().nonzero().flatten()
        assert rows.tolist() == sorted(set(batch.kv_rows.tolist()))


def test_random_weights_are_those_of_the_layers_names(tiny: Path) -> None:
    config = ModelConfig.from_pretrained(tiny).drafting()
    placement = Placement.identity(config.num_moe_layers, config.n_routed_experts, 1)
    model = Transformer(config, Mesh(), placement, Ops(), torch.float32, 256)
    load_weights(model, DummyWeights(config, torch.device("cpu")), Mesh())
    assert model.mtp is not None
    for name, weight in model.mtp.named_parameters():
        if "norm" in name:
            assert (weight == 1).all(), name
        elif "bias" in name:
            assert (weight == 0).all(), name
        else:
            assert weight.std().item() == pytest.approx(weight.shape[-1] ** -0.5, rel=0.1), name
    gates = {name: w for name, w in model.named_parameters() if name.endswith("gate.weight")}
    assert len(gates) == 5 and len({w.sum().item() for w in gates.values()}) == 5


def test_the_copies_in_the_shipped_checkpoint_are_the_main_models(tiny: Path) -> None:
    """So nothing is lost by not reading them."""
    tensors = load_file(tiny / "model.safetensors")
    assert torch.equal(tensors["model.layers.5.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.layers.5.shared_head.head.weight"], tensors["lm_head.weight"])


def test_the_shipped_layer_is_often_right(tiny: Path) -> None:
    """Given the true text up to a token, its first choice for the next one is the main model's.

    The text is a prompt of the domain and what the model says to it, as in serving.
    """
    encoder, model = load_tokenizer(tiny), hf.load(tiny, drafts=True)
    lines = [json.loads(line) for line in (ROOT / "docs" / "prompts.jsonl").read_text().splitlines()]
    prompts = [encoder.chat(line["messages"]) if "messages" in line else encoder.text(line["prompt"]) for line in lines]
    new = 48
    answer = hf.our_answer(model, prompts, new, 1000)
    share = dict.fromkeys(DOMAINS, 0.0)
    for i, (prompt, said) in enumerate(zip(prompts, answer.tokens, strict=True)):
        text = [*prompt, *said]
        rows = draft_rows(model, text)[len(prompt) - 1 : -1]  # for the tokens after the first that was said
        right = [int(row.argmax()) == token for row, token in zip(rows, said[1:], strict=True)]
        share[DOMAINS[i // 4]] += sum(right) / len(right) / 4
    print({domain: f"{value:.1%}" for domain, value in share.items()})
    assert min(share.values()) > 0.4 and max(share.values()) > 0.5, share


@torch.inference_mode()
def draft_rows(model: Transformer, text: list[int]) -> Tensor:
    """Return logits [tokens - 1, V]: row p is for the token at p + 2."""
    pages = range(1, pages_for(len(text)) + 1)
    pool = make_pool(model.config, len(pages) + 1, torch.float32, "cpu")
    batch, dispatcher = Batch.build([], [Chunk(text[:-1], 0, pages)], "cpu"), hf.dispatchers(model)[0]
    hidden = model.head.norm(model.body(batch, pool, dispatcher))
    shifted = replace(batch, token_ids=torch.tensor(text[1:]))
    return model.head.project(model.draft(hidden, shifted, pool, dispatcher))
