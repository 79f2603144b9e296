"""Train model/tiny/: a DeepSeek-V3 checkpoint of 3.7 million parameters in Hugging Face layout, with an MTP layer.

    apt-get install bible-kjv wordnet-base    # Debian: the King James Bible and WordNet 3.0
    python -m scripts.tools.train_tiny collect      # corpora -> .tiny-data/{tokenizer.json,corpus.npz}, on a CPU
    python -m scripts.tools.train_tiny train        # .tiny-data/ -> model/tiny/, in minutes on a GPU
    python -m scripts.tools.train_tiny sample       # generate the samples in training.json again, on a CPU
    python -m scripts.tools.train_tiny prompts      # held-out text as requests for run.py -> .tiny-data/

`train` writes losses, routing and samples to model/tiny/training.json. The model card, README.md, is written by hand.

The network is transformers' DeepseekV3ForCausalLM (>= 5.17). Three things are added to it here:

- The MTP layer (DeepSeek-V3 report, arXiv 2412.19437, section 2.2), which transformers does not train. Its input is
  the main model's last hidden state h_i *after* the final norm, as in vLLM's deepseek_mtp.py. At position i:
  h'_i = eh_proj([enorm(embed(t_{i+1})); hnorm(h_i)]), then one MoE block with position i's rope. After
  shared_head.norm, the head predicts t_{i+2}. Embedding and head are the main model's; the file holds copies of both.
- A dense expert path for training. Every expert computes every token, and the unchosen ones get weight 0. With 32
  experts of width 32 that is one matrix product of width 1,024. The losses at the end use transformers' own path.
- Balancing without an auxiliary loss (arXiv 2408.15664): a fixed step moves e_score_correction_bias towards equal
  loads.
"""

import argparse
import copy
import datetime
import json
import math
import sysconfig
import time
import types
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

from scripts.tools.tiny_text import (
    BOS,
    CHAT_TEMPLATE,
    DOMAINS,
    EOS,
    PAD,
    SAMPLE_PROMPTS,
    SPECIAL,
    build_tokenizer,
    encode,
    read_documents,
)

# fmt: off
CONFIG = {  # config.json
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
    "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 384, "moe_intermediate_size": 32,
    "num_hidden_layers": 5, "first_k_dense_replace": 1, "moe_layer_freq": 1, "num_nextn_predict_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "attention_bias": False, "attention_dropout": 0.0,
    "n_routed_experts": 32, "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "hidden_act": "silu", "rms_norm_eps": 1e-06, "initializer_range": 0.04, "tie_word_embeddings": False,
    "max_position_embeddings": 2048, "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn", "rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 512,
        "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    },
    "use_cache": True, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "add_eos_token": False,
    "bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "clean_up_tokenization_spaces": False,
    "model_max_length": CONFIG["max_position_embeddings"], "chat_template": CHAT_TEMPLATE,
}
# fmt: on
SHORT, LONG, LONG_EVERY = 512, 2048, 4  # tokens per row: every fourth step has long rows
SHARES = {"bible": 0.2, "wordnet": 0.4, "python": 0.4}  # of the rows of a batch, by domain
LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 3e-3, 200, 0.1
MTP_WEIGHT, BALANCE_STEP = 0.3, 1e-3

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 300, 128, 64  # per domain, for recordings of expert loads

# ---------------------------------------------------------------------------------------------------- collect


def collect(arguments: argparse.Namespace) -> None:
    """Write the tokenizer, and each domain's train and held-out documents as streams of tokens."""
    documents = read_documents(arguments.wordnet, arguments.stdlib)
    texts = [text for items in documents.values() for text, held_out in items if not held_out]
    tokenizer = build_tokenizer(texts, CONFIG["vocab_size"])
    arguments.data.mkdir(exist_ok=True)
    tokenizer.save(str(arguments.data / "tokenizer.json"))
    streams = {}
    for domain, items in documents.items():
        for split in ("train", "heldout"):
            texts = [text for text, held_out in items if held_out == (split == "heldout")]
            ids = streams[f"{domain}_{split}"] = encode(tokenizer, texts)
            print(f"{domain} {split}: {len(texts)} documents, {sum(map(len, texts))} characters, {len(ids)} tokens")
    np.savez_compressed(arguments.data / "corpus.npz", **streams)


def prompts(arguments: argparse.Namespace) -> None:
    """Write pieces of held-out text as requests: one domain after another in moving.jsonl, in turn in mixed.jsonl."""
    tokenizer, lines = Tokenizer.from_file(str(arguments.out / "tokenizer.json")), []
    for domain, documents in read_documents(arguments.wordnet, arguments.stdlib).items():
        ids = encode(tokenizer, [text for text, held_out in documents if held_out])
        for i, piece in enumerate(ids[: PROMPTS * PROMPT_TOKENS].reshape(PROMPTS, PROMPT_TOKENS).tolist()):
            line = {"id": f"{domain} {i}", "prompt_token_ids": piece, "max_tokens": NEW_TOKENS}
            lines.append(json.dumps(line | {"temperature": 0.8, "seed": i, "ignore_eos": True}) + "\n")
    arguments.data.mkdir(exist_ok=True)
    (arguments.data / "moving.jsonl").write_text("".join(lines))
    (arguments.data / "mixed.jsonl").write_text("".join(line for i in range(PROMPTS) for line in lines[i::PROMPTS]))


# ---------------------------------------------------------------------------------------------------- network


def route(gate: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Choose experts by DeepSeek-V3's noaux_tc: x [T, D] -> weights [T, E], 0 for unchosen experts, and loads [E]."""
    groups, experts = CONFIG["n_group"], CONFIG["n_routed_experts"]
    with torch.autocast(x.device.type, enabled=False):
        scores = F.linear(x.float(), gate.weight.float()).sigmoid()
    biased = (scores + gate.e_score_correction_bias).detach().unflatten(-1, (groups, experts // groups))
    best = biased.topk(2, dim=-1).values.sum(-1).topk(CONFIG["topk_group"], dim=-1).indices
    allowed = torch.zeros_like(biased[..., 0], dtype=torch.bool).scatter(-1, best, True)
    chosen = biased.masked_fill(~allowed[..., None], -math.inf).flatten(-2).topk(CONFIG["num_experts_per_tok"]).indices
    mask = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
    weights = scores * mask
    return weights / weights.sum(-1, keepdim=True) * CONFIG["routed_scaling_factor"], mask.sum(0)


def dense_moe(self: deepseek.DeepseekV3MoE, x: Tensor) -> Tensor:
    """Replace DeepseekV3MoE.forward: compute every expert for every token, and write the loads to `self.loads`."""
    flat = x.flatten(0, -2)
    weights, loads = route(self.gate, flat)
    self.loads.copy_(loads)
    gate, up = (flat @ self.experts.gate_up_proj.flatten(0, 1).T).unflatten(-1, (weights.shape[-1], 2, -1)).unbind(-2)
    hidden = F.silu(gate) * up * weights.to(gate.dtype)[..., None]
    routed = hidden.flatten(-2) @ self.experts.down_proj.transpose(1, 2).flatten(0, 1)
    return routed.view_as(x) + self.shared_experts(x)


class MtpLayer(deepseek.DeepseekV3DecoderLayer):
    """The MTP layer, to be appended to model.layers: its parameters get DeepSeek's names, and transformers skips it."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config, config.num_hidden_layers)
        width = config.hidden_size
        self.enorm, self.hnorm = (deepseek.DeepseekV3RMSNorm(width, config.rms_norm_eps) for _ in range(2))
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.shared_head = nn.ModuleDict({"norm": deepseek.DeepseekV3RMSNorm(width, config.rms_norm_eps)})

    def forward(self, hidden: Tensor, following: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Take h_i and the embeddings of t_{i+1}, both [B, S, D]. Return the head's input for t_{i+2} [B, S, D]."""
        x = self.eh_proj(torch.cat([self.enorm(following), self.hnorm(hidden)], dim=-1))
        return self.shared_head["norm"](super().forward(x, position_embeddings=rope))


def hidden_states(model: DeepseekV3ForCausalLM, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Run tokens [B, S + 2] through both parts: the main model's and the MTP layer's hidden states [B, S, D].

    From the first the head predicts tokens[:, 1:-1], from the second tokens[:, 2:].
    """
    base = model.model
    embedded = base.embed_tokens(tokens[:, :-1])
    x, following = embedded[:, :-1], embedded[:, 1:]
    rope = base.rotary_emb(x, torch.arange(x.shape[1], device=x.device)[None])
    for layer in base.layers[:-1]:
        x = layer(x, position_embeddings=rope)
    x = base.norm(x)
    return x, base.layers[-1](x, following, rope)


def head_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head).float().flatten(0, 1), targets.flatten())


def build(device: str) -> DeepseekV3ForCausalLM:
    config = DeepseekV3Config.from_dict(copy.deepcopy(CONFIG))
    model = DeepseekV3ForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    mtp = MtpLayer(model.config)
    mtp.apply(model._init_weights)
    model.model.layers.append(mtp)
    for moe in moe_layers(model):
        moe.register_buffer("loads", torch.zeros(config.n_routed_experts), persistent=False)
        moe.forward = types.MethodType(dense_moe, moe)
    return model.to(device)


def moe_layers(model: DeepseekV3ForCausalLM) -> list[deepseek.DeepseekV3MoE]:
    return [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, deepseek.DeepseekV3MoE)]


def save(model: DeepseekV3ForCausalLM, folder: Path) -> None:
    """Write model.safetensors in bf16 (the router's bias in float32), one tensor per expert and projection."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert, pair in enumerate(tensor):
                for part, half in zip(("gate", "up"), pair.chunk(2), strict=True):
                    tensors[name.replace("gate_up_proj", f"{expert}.{part}_proj.weight")] = half
        elif name.endswith("experts.down_proj"):
            tensors |= {name.replace("down_proj", f"{e}.down_proj.weight"): one for e, one in enumerate(tensor)}
        else:
            tensors[name] = tensor
    mtp = f"model.layers.{CONFIG['num_hidden_layers']}"
    tensors[f"{mtp}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{mtp}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    for name, tensor in tensors.items():
        kept = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        tensors[name] = tensor.to("cpu", kept).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def load(folder: Path, device: str) -> DeepseekV3ForCausalLM:
    """Read the checkpoint with transformers, in bf16 and with its own forward, and append the MTP layer."""
    read, layers = DeepseekV3ForCausalLM.from_pretrained, CONFIG["num_hidden_layers"]
    model, report = read(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not report["missing_keys"] and all(f"layers.{layers}." in name for name in report["unexpected_keys"]), report
    block = read(folder, dtype=torch.bfloat16, num_hidden_layers=layers + 1).model.layers[layers].state_dict()
    stored = load_file(folder / "model.safetensors")
    mtp = MtpLayer(model.config)
    own = {name: stored[f"model.layers.{layers}.{name}"] for name in mtp.state_dict() if name not in block}
    mtp.load_state_dict(block | own, assign=True)
    model.model.layers.append(mtp)
    return model.to(device).eval()


# ---------------------------------------------------------------------------------------------------- train


def sample_rows(stream: Tensor, starts: Tensor, rows: int, length: int) -> Tensor:
    """Draw random windows [rows, length + 2]. One that begins early in a document is moved back to its bos."""
    offsets = torch.randint(len(stream) - length - 1, (rows,), device=stream.device)
    opening = starts[torch.searchsorted(starts, offsets, right=True) - 1]
    offsets = torch.where(offsets - opening < length, opening, offsets)
    return stream[offsets[:, None] + torch.arange(length + 2, device=stream.device)].long()


@torch.no_grad()
def balance(model: DeepseekV3ForCausalLM, step: float) -> None:
    for moe in moe_layers(model):
        moe.gate.e_score_correction_bias += step * torch.sign(moe.loads.mean() - moe.loads)


@torch.no_grad()
def evaluate(
    model: DeepseekV3ForCausalLM, stream: Tensor, token_bytes: Tensor, limit: int | None = None
) -> tuple[dict, Tensor]:
    """Return losses, MTP agreement and the experts' loads [MoE layers, E], over successive windows of 2,048 tokens."""
    windows = stream[: (len(stream) - 2) // LONG * LONG + 2].long().unfold(0, LONG + 2, LONG)[:limit]
    totals = torch.zeros(4, dtype=torch.float64, device=stream.device)  # main nats, MTP nats, agreements, bytes
    loads = {moe: torch.zeros(CONFIG["n_routed_experts"], device=stream.device) for moe in moe_layers(model)}

    def count(moe: nn.Module, inputs: tuple[Tensor]) -> None:
        loads[moe] += route(moe.gate, inputs[0].flatten(0, -2))[1]

    hooks = [moe.register_forward_pre_hook(count) for moe in loads]
    for tokens in windows.split(8):
        main, mtp = (model.lm_head(hidden).float() for hidden in hidden_states(model, tokens))
        totals[0] += F.cross_entropy(main.flatten(0, 1), tokens[:, 1:-1].flatten(), reduction="sum")
        totals[1] += F.cross_entropy(mtp.flatten(0, 1), tokens[:, 2:].flatten(), reduction="sum")
        totals[2] += (main[:, 1:].argmax(-1) == mtp[:, :-1].argmax(-1)).sum()
        totals[3] += token_bytes[tokens[:, 1:-1]].sum()
    for hook in hooks:
        hook.remove()
    nats, mtp_nats, agreements, size = totals.tolist()
    scored = len(windows) * LONG
    return {
        "tokens": scored,
        "loss": round(nats / scored, 4),
        "bits_per_byte": round(nats / math.log(2) / size, 4),
        "mtp_loss": round(mtp_nats / scored, 4),
        "mtp_agreement": round(agreements / (scored - len(windows)), 4),
    }, torch.stack(list(loads.values()))


def routing_table(loads: dict[str, Tensor]) -> list[dict]:
    """Return every expert's share per layer and domain, and the largest over the mean. `loads`: [layers, E] each."""
    shares = {domain: (load / load.sum(-1, keepdim=True)).cpu() for domain, load in loads.items()}
    shares["all"] = sum(shares.values()) / len(shares)
    table: list[dict] = [{"layer": CONFIG["first_k_dense_replace"] + i} for i in range(len(shares["all"]))]
    for domain, layers in shares.items():
        for row, layer in zip(table, layers.double(), strict=True):
            skew = round((layer.max() / layer.mean()).item(), 2)
            row[domain] = {"max_over_mean": skew, "shares": [round(share, 4) for share in layer.tolist()]}
    return table


def train(arguments: argparse.Namespace) -> None:
    began, device, folder = time.time(), arguments.device, arguments.out
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    tokenizer = Tokenizer.from_file(str(arguments.data / "tokenizer.json"))
    arrays = np.load(arguments.data / "corpus.npz")
    corpus = {name: torch.from_numpy(array.astype(np.int32)).to(device) for name, array in arrays.items()}
    starts = {domain: (corpus[f"{domain}_train"] == 0).nonzero().flatten() for domain in DOMAINS}
    pieces = [tokenizer.id_to_token(i) for i in range(CONFIG["vocab_size"])]  # one character per byte; specials count 0
    token_bytes = torch.tensor([0 if p in SPECIAL else len(p) for p in pieces], device=device)
    model = build(device)
    loss_of = head_loss
    if device == "cuda":
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        loss_of = torch.compile(head_loss, dynamic=False)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    steps, curve, stamp = arguments.steps, [], time.time()
    for step in range(steps):
        done = step / steps
        length = LONG if step % LONG_EVERY == LONG_EVERY - 1 else SHORT
        rows = {d: max(1, round(share * arguments.batch_tokens / length)) for d, share in SHARES.items()}
        tokens = torch.cat([sample_rows(corpus[f"{d}_train"], starts[d], n, length) for d, n in rows.items()])
        with torch.autocast(device, torch.bfloat16):
            main, mtp = hidden_states(model, tokens)
            main_loss = loss_of(main, model.lm_head.weight, tokens[:, 1:-1])
            mtp_loss = loss_of(mtp, model.lm_head.weight, tokens[:, 2:])
        (main_loss + MTP_WEIGHT * mtp_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:  # warm up, then a cosine to 0
            group["lr"] = LEARNING_RATE * min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * done))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        balance(model, BALANCE_STEP * min(1.0, 5 * (1 - done)))
        if (step + 1) % max(1, steps // 20) == 0:
            entry = {"step": step + 1, "length": length, "loss": main_loss.item(), "mtp_loss": mtp_loss.item()}
            with torch.compiler.set_stance("force_eager"), torch.autocast(device, torch.bfloat16):
                entry |= {d: evaluate(model, corpus[f"{d}_heldout"], token_bytes, 8)[0]["loss"] for d in DOMAINS}
            curve.append({k: round(v, 4) for k, v in entry.items()})
            print(f"{curve[-1]} {time.time() - stamp:.1f} s", flush=True)
    trained = time.time() - stamp

    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("config", CONFIG), ("tokenizer_config", TOKENIZER_CONFIG)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    save(model, folder)
    loaded = load(folder, device)
    results = {domain: evaluate(loaded, corpus[f"{domain}_heldout"], token_bytes) for domain in DOMAINS}
    record = {
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "parameters": sum(p.numel() for p in model.parameters()),
        "settings": f"{steps} steps of {arguments.batch_tokens} tokens, AdamW {LEARNING_RATE}, decay {WEIGHT_DECAY}",
        "train_tokens": {domain: len(corpus[f"{domain}_train"]) for domain in DOMAINS},
        "tokens_processed": steps * arguments.batch_tokens,
        "training_seconds": round(trained, 1),
        "wall_seconds": round(time.time() - began, 1),
        "heldout": {domain: losses for domain, (losses, _) in results.items()},
        "curve": curve,
        "routing": routing_table({domain: loads for domain, (_, loads) in results.items()}),
    }
    print(json.dumps(record["heldout"], indent=1))
    (folder / "training.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    sample(arguments)


def sample(arguments: argparse.Namespace) -> None:
    """Record texts of the checkpoint. Chat answers are greedy; the other two domains are sampled at temperature 0.7."""
    path, tokenizer = arguments.out / "training.json", Tokenizer.from_file(str(arguments.out / "tokenizer.json"))
    model, record = load(arguments.out, "cpu"), json.loads(path.read_text())
    record["samples"] = {domain: [] for domain in DOMAINS}
    torch.manual_seed(0)
    for domain, prompt in ((name, prompt) for name, prompts in SAMPLE_PROMPTS.items() for prompt in prompts):
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        drawn = {} if domain == "wordnet" else {"do_sample": True, "temperature": 0.7, "top_k": 50}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=120, **drawn)
        text = tokenizer.decode(out[0, ids.shape[1] :].tolist())
        record["samples"][domain].append({"prompt": prompt, "text": text})
        print(f"{prompt}|{text}\n")
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("collect", "train", "sample", "prompts"), help="see above")
    parser.add_argument(
        "--data", type=Path, default=root / ".tiny-data", help="the folder for corpora and tokenizer (.tiny-data)"
    )
    parser.add_argument("--out", type=Path, default=root / "model" / "tiny", help="the checkpoint folder (model/tiny)")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="WordNet's files")
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="Python's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=10000, help="training steps (10000)")
    parser.add_argument("--batch-tokens", type=int, default=65536, help="tokens per step (65536)")
    arguments = parser.parse_args()
    {"collect": collect, "train": train, "sample": sample, "prompts": prompts}[arguments.step](arguments)


if __name__ == "__main__":
    main()
