"""Random checkpoints made by transformers, its answers, and a small driver for our model.

Only functions import transformers, because that takes seconds. The ranks of a world that load a model need none of it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.ops import Ops
from model.batch import Batch, Chunk
from model.checkpoint import open_checkpoint
from model.config import ModelConfig
from model.kv_cache import make_pool
from model.pages import PageAllocator, pages_for
from model.transformer import Transformer
from model.weights import load_weights
from parallel.dispatchers import Dispatcher, plain_dispatchers
from parallel.mesh import Mesh
from parallel.placement import Placement

if TYPE_CHECKING:
    from transformers import PreTrainedModel

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
}
BASE: dict[str, Any] = {  # widths differ from each other where possible, so that swapped ones do not fit
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 88,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 256,
    "num_nextn_predict_layers": 0,
    "rope_parameters": YARN,
}
SHAPES: dict[str, dict[str, Any]] = {  # what each configuration changes in BASE
    "v3": {"num_hidden_layers": 4, "first_k_dense_replace": 2},
    "no_q_lora": {"q_lora_rank": None},
    "one_group": {"n_group": 1, "topk_group": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "top_8": {
        "n_routed_experts": 32,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "routed_scaling_factor": 0.5,
        "n_shared_experts": 2,
    },
    "one_dense": {"num_hidden_layers": 2, "rms_norm_eps": 1e-2, "tie_word_embeddings": True},
    "no_dense": {
        "num_hidden_layers": 2,
        "first_k_dense_replace": 0,
        "rope_parameters": {k: v for k, v in YARN.items() if "mscale" not in k},
    },
    "all_dense": {"num_hidden_layers": 2, "first_k_dense_replace": 2},
}
# With these seeds the logits of the two best tokens in test_model.py's texts always differ by more than 1e-3.
SEEDS = {"v3": 0, "no_q_lora": 1, "one_group": 5, "top_8": 1, "one_dense": 4, "no_dense": 0, "all_dense": 1}


def save(folder: Path, shape: str = "v3", max_shard_size: str = "1GB", **changes: Any) -> Path:
    """Write a random checkpoint of SHAPES[shape] in float32, with widely spread logits and a large gate bias."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(**{**BASE, **SHAPES[shape], **changes})
    theirs = DeepseekV3ForCausalLM(config).float()
    randomize(theirs, SEEDS[shape])
    theirs.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def save_with_mtp(folder: Path, shape: str = "v3", **changes: Any) -> Path:
    """Write a random checkpoint as `save` does, with a multi-token-prediction layer under DeepSeek's names.

    Its block is one layer more of transformers' model. Its copies of the embedding and the LM head are wrong, so that
    a test would see whether they are read.
    """
    layers = {**BASE, **SHAPES[shape]}["num_hidden_layers"]
    save(folder, shape, num_hidden_layers=layers + 1, **changes)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(SEEDS[shape])
    width, vocab = config["hidden_size"], config["vocab_size"]
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"model.layers.{layers}.{name}.weight"] = torch.empty(width).uniform_(0.5, 1.5, generator=generator)
    eh_proj = torch.empty(width, 2 * width).normal_(0.0, 0.15, generator=generator)
    tensors[f"model.layers.{layers}.eh_proj.weight"] = eh_proj
    for name in ("embed_tokens", "shared_head.head"):
        tensors[f"model.layers.{layers}.{name}.weight"] = torch.full((vocab, width), float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def randomize(theirs: "PreTrainedModel", seed: int) -> None:
    """Fill transformers' model so that its logits spread widely and its gate biases are large."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in theirs.state_dict().items():
        if theirs.config.tie_word_embeddings and name == "lm_head.weight":
            continue
        if "norm" in name:
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif "e_score_correction_bias" in name:
            tensor.uniform_(-0.3, 0.3, generator=generator)
        else:
            std = 0.4 if "lm_head" in name else 0.2 if "embed" in name else 0.15
            tensor.normal_(0.0, std, generator=generator)


def load(
    folder: Path, mesh: Mesh | None = None, placement: Placement | None = None, drafts: bool = False
) -> Transformer:
    """Load a folder as our model, in float32. `mesh`: load one rank's share of it. `drafts`: and the draft layer."""
    mesh, config = mesh or Mesh(), ModelConfig.from_pretrained(folder)
    config = config.drafting() if drafts else config
    placement = placement or Placement.identity(config.num_moe_layers, config.n_routed_experts, mesh.ep.size)
    model = Transformer(config, mesh, placement, Ops(), torch.float32, config.max_position_embeddings)
    load_weights(model, open_checkpoint(folder, config), mesh)
    return model


def dispatchers(model: Transformer) -> tuple[Dispatcher, Dispatcher]:
    return plain_dispatchers(Mesh().ep, model.placement.num_slots, Ops())


@dataclass
class Answer:
    """The result of greedy decoding: each prompt's new tokens, and their distributions' log probabilities [new, V]."""

    tokens: list[list[int]]
    logprobs: list[Tensor]
    steps: list[tuple[int, int]] = field(default_factory=list)  # ours only: (decodes, prefill tokens) of each forward


def their_answer(folder: Path, prompts: Sequence[list[int]], new_tokens: int) -> Answer:
    """Generate greedily with transformers' DeepSeek-V3."""
    from transformers import DeepseekV3ForCausalLM

    return answer_of(DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32), prompts, new_tokens)


@torch.inference_mode()
def answer_of(theirs: "PreTrainedModel", prompts: Sequence[list[int]], new_tokens: int) -> Answer:
    """Generate greedily with transformers. Log probabilities come from one forward over the generated texts."""
    from transformers import GenerationConfig

    theirs.eval()
    theirs.generation_config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    tokens = theirs.generate(ids, attention_mask=mask)[:, longest:].tolist()
    texts = [[*p, *t] for p, t in zip(prompts, tokens, strict=True)]
    padded = torch.tensor([text + [0] * (longest + new_tokens - len(text)) for text in texts])
    logprobs = theirs(padded).logits.log_softmax(-1)
    spans = [slice(len(p) - 1, len(p) - 1 + new_tokens) for p in prompts]
    return Answer(tokens, [row[span] for row, span in zip(logprobs, spans, strict=True)])


@torch.inference_mode()
def their_experts(folder: Path, texts: Sequence[list[int]]) -> list[Tensor]:
    """Return the experts [tokens, MoE layers, K] that transformers' gates choose for each text."""
    from transformers import DeepseekV3ForCausalLM
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    theirs = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chosen: list[Tensor] = []
    for module in theirs.modules():
        if isinstance(module, DeepseekV3TopkRouter):
            module.register_forward_hook(lambda module, given, out: chosen.append(out[2]))
    found = []
    for text in texts:
        chosen.clear()
        theirs(torch.tensor([text]))
        found.append(torch.stack(chosen, dim=1))
    return found


@torch.inference_mode()
def their_logprobs(folder: Path, texts: Sequence[list[int]]) -> list[Tensor]:
    """Return the log probabilities [tokens, V] of each text: row i is the distribution of token i + 1."""
    from transformers import DeepseekV3ForCausalLM

    theirs = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return [theirs(torch.tensor([text])).logits[0].log_softmax(-1) for text in texts]


def our_answer(
    model: Transformer,
    prompts: Sequence[list[int]],
    new_tokens: int,
    chunk: int,
    arrivals: Sequence[int] | None = None,
) -> Answer:
    """Decode all prompts greedily in one batch, with prompt chunks of `chunk` tokens.

    Prompt i joins at step arrivals[i]. Pages are allocated one by one while sequences grow, so they are interleaved in
    the pool.
    """
    arrivals = arrivals or [0] * len(prompts)
    allocator = PageAllocator(sum(pages_for(len(p) + new_tokens) for p in prompts) + 1)
    pool = make_pool(model.config, allocator.capacity + 1, torch.float32, "cpu")
    contiguous, masked = dispatchers(model)
    texts, computed = [list(p) for p in prompts], [0] * len(prompts)
    pages: list[list[int]] = [[] for _ in prompts]
    logits: list[list[Tensor]] = [[] for _ in prompts]
    steps = []
    while any(len(rows) < new_tokens for rows in logits):
        active = [i for i, at in enumerate(arrivals) if at <= len(steps) and len(logits[i]) < new_tokens]
        decodes, prefills = ([i for i in active if bool(logits[i]) is decoding] for decoding in (True, False))
        chunks = {}
        for i in decodes + prefills:
            ids = texts[i][computed[i] : computed[i] + chunk]
            while len(pages[i]) < pages_for(computed[i] + len(ids)):
                pages[i].extend(allocator.alloc(1))
            chunks[i] = Chunk(ids, computed[i], list(pages[i]), computed[i] + len(ids) == len(texts[i]))
            computed[i] += len(ids)
        batch = Batch.build([chunks[i] for i in decodes], [chunks[i] for i in prefills], "cpu")
        rows = model(batch, pool, contiguous if prefills else masked)
        steps.append((len(decodes), batch.num_tokens - len(decodes)))
        for i, row in zip([i for i in decodes + prefills if chunks[i].wants_logits], rows, strict=True):
            logits[i].append(row)
            texts[i].append(int(row.argmax()))
    tokens = [text[len(p) :] for text, p in zip(texts, prompts, strict=True)]
    return Answer(tokens, [torch.stack(rows).log_softmax(-1) for rows in logits], steps)
