"""The torch twins of the attention ops; `kernels/ref.py` has the others."""

from typing import Any

import torch
from torch import Tensor

from kernels.fp8 import Quantized, quantize_1x128


def prefill_attention(
    q: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    q_starts: Tensor,
    kv_starts: Tensor,
    max_q: int,
    max_kv: int,
    scale: float,
    quantize: bool = False,
) -> Tensor | Quantized:
    """Attend causally over ragged sequences whose queries are the LAST tokens of their keys (a prefix is allowed).

    q [sum q, H, nope + R], v [sum kv, H, dv], q_starts, kv_starts [S + 1] -> [sum q, H, dv]. A key joins its head's
    k_nope [sum kv, H, nope] and k_rope [sum kv, R], which all heads share. With `quantize`: return quantize_1x128 of
    the result flattened, values [sum q, H dv] and their scales.
    """
    k = torch.cat((k_nope, k_rope[:, None].expand(-1, k_nope.shape[1], -1)), -1)
    out = v.new_empty(q.shape[0], q.shape[1], v.shape[-1])
    q_bounds, kv_bounds = q_starts.tolist(), kv_starts.tolist()
    for i in range(len(q_bounds) - 1):
        qs, ks = slice(q_bounds[i], q_bounds[i + 1]), slice(kv_bounds[i], kv_bounds[i + 1])
        num_q, num_kv = qs.stop - qs.start, ks.stop - ks.start
        scores = torch.einsum("qhd,khd->hqk", q[qs].float(), k[ks].float()) * scale
        future = torch.ones(num_q, num_kv, dtype=torch.bool, device=q.device).triu(num_kv - num_q + 1)
        scores = scores.masked_fill(future, float("-inf")).softmax(-1)
        out[qs] = torch.einsum("hqk,khd->qhd", scores, v[ks].float()).to(out.dtype)
    return quantize_1x128(out.flatten(1)) if quantize else out


def decode_plan(kv_lens: Tensor, q_len: int, heads: int) -> Any:
    """Return the `plan` that one step's calls of mla_decode share, computed once. Here it is empty.

    kv_lens [B]; `q_len` tokens of each sequence, `heads` of each token.
    """
    return None


def mla_decode(
    q: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    kv_lens: Tensor,
    scale: float,
    v_dim: int | None = None,
    plan: Any = None,
) -> Tensor:
    """Attend the last Q tokens of each of B sequences with absorbed MLA, causally.

    Keys are whole cache rows, values their first `v_dim` columns (None: all). q [B Q, H, C + R] has a sequence's tokens
    in a row. The last of them sees all `kv_lens[i]` rows, the one before it one row less. kv_pages [pages, 64, C + R],
    page_table [B, P], kv_lens [B] -> [B Q, H, v_dim].

    A sequence of length 0 is padding: its results are zero here, and finite in every library if the pool is finite.
    Others have at least Q rows. `plan` is `decode_plan(kv_lens, Q, H)` of the same library; calls with equal shapes and
    kv_lens share it. None: this call makes its own.
    """
    q_len, heads = len(q) // max(1, len(kv_lens)), q.shape[1]
    out, page_table = q.new_zeros(*q.shape[:2], v_dim or q.shape[2]), page_table.long()
    rows_each = len(kv_lens), q_len * heads
    queries, results = (q.float() * scale).reshape(*rows_each, q.shape[2]), out.view(*rows_each, out.shape[2])
    for i, length in enumerate(kv_lens.tolist()):
        if length:
            pages = page_table[i, : -(-length // kv_pages.shape[1])]
            rows = kv_pages[pages].flatten(0, 1)[:length].float()
            scores = queries[i] @ rows.T  # [Q H, length]
            if q_len > 1:
                future = torch.ones(q_len, length, dtype=torch.bool, device=q.device).triu(length - q_len + 1)
                scores = scores.masked_fill(future.repeat_interleave(heads, 0), float("-inf"))
            results[i] = scores.softmax(-1) @ rows[:, : out.shape[2]]
    return out
