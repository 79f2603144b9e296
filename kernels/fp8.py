"""DeepSeek-V3's two fp8 formats in torch (technical report, section 3.3.2).

Values are e4m3, scales float32. Activations have one scale per row and 128 columns, weights one per 128 x 128 block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fp8_format import BLOCK, FP8_MAX

Quantized = tuple[Tensor, Tensor]  # e4m3 values [..., D] and their 1x128 scales, float32 [..., D / 128]


def unquantized(x: Tensor | Quantized) -> Tensor:
    """Return x, which the caller knows not to be quantised."""
    assert isinstance(x, Tensor)
    return x


def quantize_1x128(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise x [..., D] -> e4m3 [..., D] and float32 scales [..., ceil(D / 128)], so that x ~ fp8 * scale.

    This is the activations' format. A scale is max(largest magnitude, 1e-4) / 448.
    """
    groups = F.pad(x.float(), (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = groups.abs().amax(-1).clamp(min=1e-4) / FP8_MAX
    scaled = (groups / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return scaled.flatten(-2)[..., : x.shape[-1]].contiguous(), scale


def dequantize_1x128(x: Tensor, scale: Tensor) -> Tensor:
    """Dequantise e4m3 [..., D] with scales [..., ceil(D / 128)] -> float32 [..., D]."""
    return x.float() * scale.repeat_interleave(BLOCK, -1)[..., : x.shape[-1]]


def quantize_128x128(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise [..., N, D] -> e4m3 [..., N, D] and float32 scales [..., ceil(N / 128), ceil(D / 128)].

    This is the weights' format. The scales are a checkpoint's `weight_scale_inv`.
    """
    rows, columns = weight.shape[-2:]
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # [..., n, 128, d, 128]
    scale = blocks.abs().amax((-3, -1)).clamp(min=1e-12) / FP8_MAX
    scaled = (blocks / scale[..., None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return scaled.flatten(-4, -3).flatten(-2)[..., :rows, :columns].contiguous(), scale


def dequantize_128x128(weight: Tensor, scale: Tensor, first_row: int = 0, first_column: int = 0) -> Tensor:
    """Dequantise e4m3 [..., n, d] -> float32 [..., n, d].

    `weight` may be the part of a tensor that begins at (first_row, first_column); `scale` is the whole tensor's.
    """
    row = torch.arange(first_row, first_row + weight.shape[-2], device=weight.device) // BLOCK
    column = torch.arange(first_column, first_column + weight.shape[-1], device=weight.device) // BLOCK
    return weight.float() * scale[..., row[:, None], column]
