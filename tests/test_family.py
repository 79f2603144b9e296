"""Every member of the family runs by its config.json alone, and computes what transformers computes.

Members are small and random. Each has two checkpoints: one with a config.json as published (old spellings, fields that
mean nothing here), one with the config.json that transformers saves.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    PreTrainedModel,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.glm4_moe_lite.modeling_glm4_moe_lite import Glm4MoeLiteTopkRouter as GlmRouter

from kernels.ops import Ops
from model.checkpoint import checkpoint_table
from model.config import MOST_SIZE, MOST_WEIGHT_BYTES, ModelConfig
from model.model_types import MISSING, MISSING_FIELDS, SUPPORTED
from model.moe import Gate
from scripts.bench.lib.shapes import SHAPES
from tests import hf
from tests.test_config import MINIMAL, refused
from tests.test_worlds import serve_members
from tests.worlds import run_world

V2 = DeepseekV2Config, DeepseekV2ForCausalLM
V3 = DeepseekV3Config, DeepseekV3ForCausalLM
GLM = Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM
ORACLES = {"deepseek_v2": V2, "deepseek_v3": V3, "glm4_moe_lite": GLM, "kimi_k2": V3}

NEW_TOKENS = 32
FEW = 4  # new tokens on four ranks, and disaggregated
LENGTHS = (5, 64)
VOCAB = hf.BASE["vocab_size"]


@dataclass(frozen=True)
class Member:
    """A model type, what it changes in hf.BASE, and what its published config.json says besides."""

    model_type: str
    sizes: dict[str, Any]
    published: dict[str, Any]
    seeds: tuple[int, int] = (0, 1)  # published, saved by transformers: the best two logits differ by 1e-3 everywhere


def yarn(**numbers: Any) -> dict[str, Any]:
    return {"rope_type": "yarn", "rope_theta": 10000.0, "original_max_position_embeddings": 64, **numbers}


NO_GROUPS = {"n_group": 1, "topk_group": 1}
PLAIN = {"rope_type": "default", "rope_theta": 50000.0}
QUIRKS = {
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "seq_aux": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
V2_QUIRKS = {**QUIRKS, "architectures": ["DeepseekV2ForCausalLM"], "scoring_func": "softmax"}
V3_QUIRKS = {
    **QUIRKS,
    "architectures": ["DeepseekV3ForCausalLM"],
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "head_dim": 64,
}
# As in zai-org/GLM-4.7-Flash, which has neither mlp_layer_types nor scoring_func.
GLM_QUIRKS = {
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "eos_token_id": [1, 7],
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "topk_method": "noaux_tc",
}
V2_LITE = {
    "topk_method": "greedy",
    **NO_GROUPS,
    "q_lora_rank": None,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "rope_parameters": yarn(factor=40, beta_fast=32, beta_slow=1, mscale=0.707, mscale_all_dim=0.707),
}
GLM_FLASH = {
    **NO_GROUPS,
    "qk_nope_head_dim": 24,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "routed_scaling_factor": 1.8,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}
MEMBERS = {
    "v2_lite": Member("deepseek_v2", V2_LITE, V2_QUIRKS),
    "v2_tied": Member(  # greedy ignores groups
        "deepseek_v2", {**V2_LITE, "n_group": 4, "topk_group": 1, "tie_word_embeddings": True}, V2_QUIRKS
    ),
    "v2": Member(
        "deepseek_v2",
        {
            "topk_method": "group_limited_greedy",
            "n_routed_experts": 20,
            "norm_topk_prob": False,
            "routed_scaling_factor": 16.0,
            "rope_parameters": yarn(factor=4, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0),
        },
        V2_QUIRKS,
    ),
    "v3": Member("deepseek_v3", {}, V3_QUIRKS),
    "moonlight": Member(
        "deepseek_v3",
        {**NO_GROUPS, "q_lora_rank": None, "n_shared_experts": 2, "rms_norm_eps": 1e-5, "rope_parameters": PLAIN},
        V3_QUIRKS,
    ),
    "kimi_k2": Member(
        "kimi_k2",
        {
            **NO_GROUPS,
            "n_routed_experts": 24,
            "num_experts_per_tok": 5,
            "routed_scaling_factor": 2.827,
            "rope_parameters": yarn(factor=32, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0),
        },
        V3_QUIRKS,
    ),
    "glm_4_7_flash": Member("glm4_moe_lite", GLM_FLASH, GLM_QUIRKS, (0, 2)),
    "no_shared_experts": Member(
        "deepseek_v3", {"n_shared_experts": 0}, {**V3_QUIRKS, "n_shared_experts": None}, (1, 2)
    ),
    "dense_only": Member("deepseek_v2", {**V2_LITE, "num_hidden_layers": 2, "first_k_dense_replace": 2}, V2_QUIRKS),
    "moe_only": Member(
        "glm4_moe_lite",
        {**GLM_FLASH, "num_hidden_layers": 2, "first_k_dense_replace": 0, "mlp_layer_types": ["sparse", "sparse"]},
        GLM_QUIRKS,
    ),
}


def write(folder: Path, name: str, published: bool) -> PreTrainedModel:
    """Write a random checkpoint, with a tokenizer of words, and return transformers' model of it."""
    member = MEMBERS[name]
    config_type, model_type = ORACLES[member.model_type]
    theirs = model_type(config_type(**{**hf.BASE, **member.sizes})).float()
    hf.randomize(theirs, member.seeds[0 if published else 1])
    theirs.save_pretrained(folder)
    if published:
        raw = {**hf.BASE, **member.sizes, **member.published}
        raw["rope_theta"] = (rope := dict(raw.pop("rope_parameters"))).pop("rope_theta")
        raw["rope_scaling"] = {"type": "yarn", **rope} if rope.pop("rope_type") == "yarn" else None
        raw.pop("mlp_layer_types", None)
    else:
        raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": member.model_type}))
    if not theirs.config.n_shared_experts:  # transformers makes them, without columns
        path = folder / "model.safetensors"
        save_file({key: t for key, t in load_file(path).items() if t.numel()}, path, metadata={"format": "pt"})
    Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, "w0")).save(str(folder / "tokenizer.json"))
    return theirs


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


class Checkpoints:
    """The members' checkpoints, each written and answered by transformers when a test first wants it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, {}

    def __call__(self, name: str, published: bool = True) -> tuple[Path, hf.Answer]:
        if (name, published) not in self.made:
            folder = self.folder / f"{name}-{published}"
            theirs = write(folder, name, published)
            self.made[name, published] = folder, hf.answer_of(theirs, prompts(), NEW_TOKENS)
        return self.made[name, published]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("family"))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("published", [True, False], ids=["published", "saved"])
@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_answers_as_transformers_does(name: str, published: bool, checkpoint: Checkpoints) -> None:
    folder, theirs = checkpoint(name, published)
    ours = hf.our_answer(hf.load(folder), prompts(), NEW_TOKENS, 16, (0, 2))
    assert ours.tokens == theirs.tokens
    assert max((a - b).abs().max() for a, b in zip(ours.logprobs, theirs.logprobs, strict=True)) <= 1e-4
    assert len(set(sum(theirs.tokens, []))) >= 20, "these answers are not worth comparing"
    assert all(logprobs.std(-1).min() > 0.5 for logprobs in theirs.logprobs)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", MEMBERS)
def test_both_spellings_of_a_config_mean_the_same(name: str, checkpoint: Checkpoints) -> None:
    published, saved = (ModelConfig.from_pretrained(checkpoint(name, spelling)[0]) for spelling in (True, False))
    assert replace(published, eos_token_ids=()) == replace(saved, eos_token_ids=())


IN_A_WORLD = ["v2_lite", "v2", "v3", "moonlight", "kimi_k2", "glm_4_7_flash"]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_members_answer_the_same_on_four_ranks_and_disaggregated(checkpoint: Checkpoints) -> None:
    made = [checkpoint(name) for name in IN_A_WORLD]
    run_world(4, serve_members, prompts(), [(folder, [new[:FEW] for new in answer.tokens]) for folder, answer in made])


ROUTERS = {"deepseek_v2": DeepseekV2TopkRouter, "deepseek_v3": DeepseekV3TopkRouter, "glm4_moe_lite": GlmRouter}
GATES = [  # model_type, topk_method, experts, groups, groups kept, experts per token, weights normalised?
    ("deepseek_v2", "greedy", 64, 1, 1, 6, False),
    ("deepseek_v2", "group_limited_greedy", 160, 8, 3, 6, False),
    ("deepseek_v2", "group_limited_greedy", 12, 4, 4, 1, False),
    ("deepseek_v3", "noaux_tc", 256, 8, 4, 8, True),
    ("deepseek_v3", "noaux_tc", 32, 4, 2, 4, False),
    ("deepseek_v3", "noaux_tc", 384, 1, 1, 8, True),
    ("glm4_moe_lite", "noaux_tc", 64, 1, 1, 4, True),
]


@pytest.mark.parametrize(("model_type", "method", "experts", "groups", "keep", "top_k", "normalize"), GATES)
def test_a_gate_chooses_and_weighs_as_transformers_does(
    model_type: str, method: str, experts: int, groups: int, keep: int, top_k: int, normalize: bool
) -> None:
    """On 10,000 tokens, of which every fifth has many equal logits. There the choice among equal scores is free.

    For V2, transformers ignores whether weights are normalised: the next test looks at that.
    """
    sizes = {"hidden_size": experts, "n_routed_experts": experts, "n_group": groups, "topk_group": keep}
    sizes |= {"num_experts_per_tok": top_k, "topk_method": method, "norm_topk_prob": normalize}
    sizes |= {"routed_scaling_factor": 2.5}
    theirs = ROUTERS[model_type](ORACLES[model_type][0](**{**hf.BASE, **sizes}))
    gate = Gate(ModelConfig.from_dict({**hf.BASE, **sizes, "model_type": model_type}), Ops(), torch.float32, "cpu")
    theirs.weight.data.copy_(torch.eye(experts))  # the logits are the hidden states
    bias = torch.zeros(experts)
    if gate.e_score_correction_bias is not None:
        bias = torch.randint(-3, 4, (experts,)) / 16  # equal logits often have equal biases, too
        gate.e_score_correction_bias.copy_(bias)
        theirs.e_score_correction_bias.copy_(bias)
    logits = torch.randn(10_000, experts) * 2
    logits[::5] = logits[::5].round()
    with torch.inference_mode():
        _, their_weights, their_ids = theirs(logits)
        ids, weights = gate(logits, torch.arange(experts), torch.ones(len(logits), dtype=torch.bool))
    order, their_order = ids.argsort(-1), their_ids.argsort(-1)
    ids, their_ids = ids.gather(-1, order), their_ids.gather(-1, their_order)
    assert ids.diff(dim=-1).gt(0).all(), "a token chose an expert twice"
    scores = (logits.softmax(-1) if model_type == "deepseek_v2" else logits.sigmoid()) + bias
    clear = scores.sort(-1).values.diff(dim=-1).ne(0).all(-1)
    assert clear.sum() >= 2000
    assert torch.equal(ids[clear], their_ids[clear])
    weights, their_weights = weights.gather(-1, order), their_weights.gather(-1, their_order)
    torch.testing.assert_close(weights[clear], their_weights[clear], rtol=1e-6, atol=0)
    best = scores.unflatten(-1, (groups, -1)).sort(-1, descending=True).values[..., : 1 + (method == "noaux_tc")]
    best = best.sum(-1).sort(-1, descending=True).values
    sure = best[:, keep - 1] != best[:, keep] if keep < groups else torch.ones(len(best), dtype=torch.bool)
    assert (sure & ~clear).sum() >= 500
    chosen, their_chosen = (scores.gather(-1, i).sort(-1).values for i in (ids, their_ids))
    assert torch.equal(chosen[sure], their_chosen[sure])


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("normalize", [True, False])
def test_v2_scales_or_normalises_as_its_published_code_does(normalize: bool, top_k: int) -> None:
    sizes = {"hidden_size": 8, "n_routed_experts": 8, "num_experts_per_tok": top_k, "routed_scaling_factor": 2.5}
    sizes |= {"model_type": "deepseek_v2", "topk_method": "greedy", "norm_topk_prob": normalize}
    gate = Gate(ModelConfig.from_dict({**hf.BASE, **sizes}), Ops(), torch.float32, "cpu")
    logits = torch.randn(20, 8)
    _, weights = gate(logits, torch.arange(8), torch.ones(20, dtype=torch.bool))
    best = logits.exp().sort(-1, descending=True).values
    want = 2.5 * best[:, :top_k] / best.sum(-1, keepdim=True)
    if normalize and top_k > 1:
        want = best[:, :top_k] / best[:, :top_k].sum(-1, keepdim=True)
    torch.testing.assert_close(weights, want)


@pytest.mark.parametrize("model_type", [*MISSING, "llama", None, ["deepseek_v3"]])
def test_another_model_is_refused_with_the_feature_that_is_missing(model_type: Any) -> None:
    feature = MISSING[model_type] if isinstance(model_type, str) and model_type in MISSING else ""
    refused(MINIMAL | {"model_type": model_type}, f"model_type is {model_type!r}", feature, *SUPPORTED)


def test_the_features_are_named_in_the_fields_words() -> None:
    refused(MINIMAL | {"model_type": "deepseek_v32"}, "needs sparse attention (DeepSeek Sparse Attention); supported")
    refused(MINIMAL | {"model_type": "kimi_linear"}, "needs linear attention (Kimi Delta Attention)")


@pytest.mark.parametrize("name", MISSING_FIELDS)
def test_a_field_of_another_model_is_refused(name: str) -> None:
    refused(MINIMAL | {name: 64}, f"'deepseek_v3' with {name} 64, which needs {MISSING_FIELDS[name]}; supported")
    assert ModelConfig.from_dict(MINIMAL | {name: None}) == ModelConfig.from_dict(MINIMAL)


WRONG = {
    "V2's gate in V3": ("deepseek_v3", {"topk_method": "greedy"}, "topk_method is 'greedy'; only 'noaux_tc'"),
    "V3's gate in V2": (
        "deepseek_v2",
        {"topk_method": "noaux_tc"},
        "topk_method is 'noaux_tc'; only 'greedy' or 'group_limited_greedy' is supported",
    ),
    "V3's scores in V2": ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; only 'softmax'"),
    "no groups": ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": None}, "missing: n_group"),
    "mixed layers": (
        "glm4_moe_lite",
        {"mlp_layer_types": ["sparse", "dense", "sparse"]},
        "mlp_layer_types is ['sparse', 'dense', 'sparse']; it must be a list of 'dense', then 'sparse'",
    ),
    "layer types as text": ("glm4_moe_lite", {"mlp_layer_types": "dense"}, "mlp_layer_types is 'dense'; it must be"),
    "too few layer types": (
        "glm4_moe_lite",
        {"mlp_layer_types": ["dense"]},
        "mlp_layer_types has 1 entries; num_hidden_layers is 3",
    ),
    "no context": ("glm4_moe_lite", {"max_position_embeddings": None}, "missing: max_position_embeddings"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_field_that_does_not_fit_its_model_type_is_refused(case: str) -> None:
    model_type, given, message = WRONG[case]
    refused({**MINIMAL, "model_type": model_type, "max_position_embeddings": 256, **given}, message)


def test_parameters_are_counted_as_the_checkpoints_table_does() -> None:
    for name, member in MEMBERS.items():
        config = ModelConfig.from_dict({**hf.BASE, **member.sizes, "model_type": member.model_type})
        sizes = {entry.name: math.prod(entry.shape) for entry in checkpoint_table(config)}  # a tied one once
        assert config.num_parameters == sum(sizes.values()), name


@pytest.mark.parametrize(
    ("shape", "billions"), [("v3", 671), ("v2_lite", 15.7), ("moonlight", 16.0), ("glm_4_7_flash", 29.9)]
)
def test_published_models_have_the_parameters_that_their_authors_say(shape: str, billions: float) -> None:
    assert SHAPES[shape].num_parameters / 1e9 == pytest.approx(billions, rel=3e-3)


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "n_routed_experts", "num_attention_heads"])
def test_a_size_that_no_machine_holds_is_refused(name: str) -> None:
    config = ModelConfig.from_dict(MINIMAL)
    least = 1 + MOST_WEIGHT_BYTES // 2
    assert replace(config, **{name: MOST_SIZE}).num_parameters >= least
    refused(MINIMAL | {name: MOST_SIZE}, "its sizes make a model of", f"at most {MOST_WEIGHT_BYTES:,} are taken")
