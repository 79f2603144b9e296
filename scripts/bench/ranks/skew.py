"""Skewed routing for models with random weights: the gates' biases give each expert a wanted share of the tokens.

DeepSeek-V3 keeps its load even by moving each expert's bias against its load (section 2.1.2, auxiliary-loss-free load
balancing). Here the same rule moves the biases towards an uneven load.
"""

import torch
from torch import Tensor

from model.moe import Gate
from model.transformer import Transformer

TOKENS, ROUNDS, RATE = 8192, 200, 0.3
MOST = 0.9  # the largest share of all tokens that one expert can get


def zipf(experts: int, exponent: float, top_k: int) -> Tensor:
    """Return the share of tokens that choose each expert [E], most popular first. The shares sum to top_k.

    They follow rank^-exponent, but none exceeds MOST: the excess of an expert goes to the others.
    """
    law = torch.arange(1, experts + 1, dtype=torch.float64) ** -exponent
    full = 0  # experts whose share is MOST
    while True:
        rest = law[full:] * (top_k - full * MOST) / law[full:].sum()
        if rest[0] <= MOST:
            return torch.cat((torch.full((full,), MOST, dtype=torch.float64), rest)).float()
        full += 1


@torch.inference_mode()
def skew_gates(model: Transformer, exponent: float) -> None:
    """Set the gates' biases so that each MoE layer's experts are chosen by `zipf`, in an order of the layer's own.

    The order depends only on the layer and the number of experts. The gates' logits must have standard deviation 1, as
    from `model/dummy.py`.
    """
    config = model.config
    shares = zipf(config.n_routed_experts, exponent, config.num_experts_per_tok)
    for layer, block in enumerate(model.layers):
        if block.is_moe:
            order = torch.randperm(len(shares), generator=torch.Generator().manual_seed(layer))
            fit(block.mlp.gate, shares[order])


def fit(gate: Gate, shares: Tensor) -> None:
    """Set the gate's bias so that these shares [E] of random tokens choose each expert."""
    bias = gate.e_score_correction_bias
    assert bias is not None, "this gate has no bias"
    experts, device = len(bias), bias.device
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(TOKENS, experts, generator=generator, device=device)
    each, all_tokens = torch.arange(experts, device=device), torch.ones(TOKENS, dtype=torch.bool, device=device)
    wanted = shares.to(device)
    bias.zero_()
    for i in range(ROUNDS):
        chosen, _ = gate(logits, each, all_tokens)
        got = torch.bincount(chosen.flatten(), minlength=experts) / TOKENS
        bias += RATE * (1 - i / ROUNDS) * (wanted - got) / (wanted + got)
