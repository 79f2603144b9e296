"""Attention in Triton: paged MLA decode (split-KV) and ragged causal prefill, for Hopper's TMA and wgmma.

Both keep a running maximum and sum per query row (FlashAttention-2, Dao 2023), and use base-2 exponentials. They read
keys and values with TMA: one thread asks for a whole tile, and the copy engine fills shared memory while the tensor
cores work. TMA fills everything past the edge with zeros.

Head dims need not be powers of two: columns come as a MAIN and a REST part, two dots into one accumulator. Decode cuts
a cache row this way (576 = 512 + 64). Prefill's keys have two parts anyway: a head's own 128 columns, and the 64 that
all heads share.
"""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def attention_scores(q_main, q_rest, k_main, k_rest, HAS_REST: tl.constexpr):
    sums = tl.dot(q_main, k_main.T, input_precision="ieee")  # [M, N]
    if HAS_REST:
        sums = tl.dot(q_rest, k_rest.T, sums, input_precision="ieee")
    return sums


@triton.jit
def softmax_step(scores, top, scale):
    """Do one block of the running softmax: return its weights, the new maximum, and the factor for earlier blocks."""
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    return tl.exp2(scores * scale - new_top[:, None]), new_top, tl.exp2(top - new_top)
