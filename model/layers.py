"""The small layers. Weights are allocated uninitialised; `model/weights.py` fills them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.addends import Delta
from kernels.fp8 import Quantized, unquantized
from kernels.fp8_format import BLOCK
from kernels.ops import Ops
from model.config import ModelConfig

FP8 = torch.float8_e4m3fn
MOST_ROPE_BYTES = 2**30  # for the rope tables; DeepSeek-V3's take 42 million bytes


def weight(*shape: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def block_scales(values: nn.Parameter) -> nn.Parameter | None:
    """Allocate the scales of an fp8 weight [..., N, D]: float32 [..., ceil(N / 128), ceil(D / 128)].

    Returns None if `values` is not fp8.
    """
    if values.dtype != FP8:
        return None
    *stack, rows, columns = values.shape
    return weight(*stack, -(-rows // BLOCK), -(-columns // BLOCK), dtype=torch.float32, device=values.device)


class Linear(nn.Module):
    """y = x @ weight.T, no bias; weight [out, in] of `dtype`.

    In fp8 (DeepSeek-V3, section 3.3) the weight has one scale per 128x128 block, x is quantised 1x128 and y is bf16.
    """

    def __init__(self, num_in: int, num_out: int, ops: Ops, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.ops = ops
        self.weight = weight(num_out, num_in, dtype=dtype, device=device)
        self.weight_scale_inv = block_scales(self.weight)

    def forward(self, x: Tensor | Quantized) -> Tensor:
        """x [T, in] -> [T, out]. In fp8, x may be quantised already: Linears that share an input quantise it once."""
        if self.weight_scale_inv is None:
            return self.ops.linear(unquantized(x), self.weight)
        values, scale = self.ops.quantize_1x128(x) if isinstance(x, Tensor) else x
        return self.ops.gemm_fp8(values, scale, self.weight, self.weight_scale_inv)


class RMSNorm(nn.Module):
    """RMSNorm, with the quantisation that an fp8 Linear wants of its input.

    `quantize`: also return the output in fp8, from the same pass. `bare`: also return it unquantised (the gate needs
    it).
    """

    def __init__(
        self,
        size: int,
        eps: float,
        ops: Ops,
        dtype: torch.dtype,
        device: torch.device | str,
        quantize: bool = False,
        bare: bool = False,
    ) -> None:
        super().__init__()
        self.weight = weight(size, dtype=dtype, device=device)
        self.eps, self.ops, self.quantize, self.bare = eps, ops, quantize, bare

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)

    def operand(self, x: Tensor) -> Tensor | Quantized:
        """Return norm(x), as a Linear takes it."""
        return self.ops.rms_norm_quant(x, self.weight, self.eps, bare=False)[1:] if self.quantize else self(x)

    def add(self, x: Tensor, delta: Delta | None) -> tuple[Tensor | None, Tensor | Quantized, Tensor]:
        """Return norm(x + delta), the same as a Linear takes it, and x + delta. `delta` None is 0.

        With `quantize` but without `bare`, the first may be None.
        """
        if self.quantize:
            if delta is None:
                normed, values, scale = self.ops.rms_norm_quant(x, self.weight, self.eps, self.bare)
                return normed, (values, scale), x
            normed, values, scale, total = self.ops.add_rms_norm_quant(x, delta, self.weight, self.eps, self.bare)
            return normed, (values, scale), total
        if delta is None:
            return (normed := self(x)), normed, x
        normed, total = self.ops.add_rms_norm(x, delta, self.weight, self.eps)
        return normed, normed, total


class Embedding(nn.Module):
    def __init__(self, vocab_size: int, hidden: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = weight(vocab_size, hidden, dtype=dtype, device=device)

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight)


def rope_table(config: ModelConfig, length: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return cos, sin [length, R / 2] float32. Raises ValueError with the equation if they would be too large.

    YaRN (section 3.2): pairs that turn more than `beta_fast` times within the original context keep their frequency.
    Pairs that turn less than `beta_slow` times have it divided by `factor`. A linear ramp over the pair indices lies
    in between.
    """
    rope, dim = config.rope, config.qk_rope_head_dim
    if (size := length * dim * 4) > MOST_ROPE_BYTES:
        raise ValueError(
            f"--max-model-len: rope tables for max_model_len ({length}, config.json's max_position_embeddings if not "
            f"given) x qk_rope_head_dim ({dim}) x 4 bytes = {size:,} bytes; at most {MOST_ROPE_BYTES:,} are taken"
        )
    freqs = rope.theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.factor != 1.0:

        def pair_turning(turns: float) -> float:
            """Return the (real-valued) index of the pair that turns this often over the original context."""
            return dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

        low = max(math.floor(pair_turning(rope.beta_fast)), 0)
        high = min(math.ceil(pair_turning(rope.beta_slow)), dim - 1)
        ramp = ((torch.arange(dim // 2) - low) / max(high - low, 0.001)).clamp(0, 1)  # 0 = keep, 1 = divide
        freqs = freqs * (1 - ramp) + freqs / rope.factor * ramp
    angles = torch.outer(torch.arange(length, dtype=torch.float32), freqs)
    # As in transformers: the ratio of the two mscales if both are given, else YaRN's own attention factor. DeepSeek's
    # code gives the same for the published models, which have both.
    scale = mscale(rope.factor)
    if rope.mscale and rope.mscale_all_dim:
        scale = mscale(rope.factor, rope.mscale) / mscale(rope.factor, rope.mscale_all_dim)
    return angles.cos().mul_(scale).to(device), angles.sin().mul_(scale).to(device)


def mscale(factor: float, weight: float = 1.0) -> float:
    """Return YaRN's attention temperature (section 3.4), as DeepSeek generalises it."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Return 1 / sqrt(head dim), times mscale squared under YaRN (DeepSeek-V2, section 3.1.4).

    DeepSeek's published code does so for V2 and V3. transformers does too, but its first versions of V2 did not.
    """
    scale = config.qk_head_dim**-0.5
    if config.rope.mscale_all_dim:
        scale *= mscale(config.rope.factor, config.rope.mscale_all_dim) ** 2
    return scale
