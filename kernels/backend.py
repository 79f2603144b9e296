"""Which library serves which op: decided once, handed to the model's constructors, printed once per job.

Every op has a torch twin in `kernels/ref.py`: its specification, and the CPU path. Every op also has a Triton kernel of
ours, and some are served by a vendor's library. An op takes the first library in its row of PREFERENCE that can serve.
"""

import importlib
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from kernels import ref
from kernels.ops import Ops
from kernels.rooms import ALIGNMENT


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that decide whether a library can serve it."""

    kv_lora_rank: int
    rope_dim: int
    qk_head_dim: int
    v_head_dim: int
    hidden: int
    expert_width: int


@dataclass(frozen=True)
class Choice:
    op: str
    library: str
    why: str  # why the preferred libraries cannot serve


OURS = {  # op -> the module with its Triton kernel
    "rms_norm": "kernels.norm",
    "add_rms_norm": "kernels.norm",
    "rms_norm_quant": "kernels.norm",
    "add_rms_norm_quant": "kernels.norm",
    "rope_query": "kernels.norm",
    "absorb_query": "kernels.absorb",
    "write_and_absorb": "kernels.absorb",
    "project_values": "kernels.absorb",
    "norm_rope_write": "kernels.norm",
    "silu_mul": "kernels.quant",
    "prefill_attention": "kernels.prefill_attention",
    "mla_decode": "kernels.mla_decode",
    "linear": "kernels.linear",
    "linear_float32": "kernels.linear",
    "ffn_beside": "kernels.linear",
    "gate_topk": "kernels.gate",
    "ep_scatter": "kernels.route",
    "ep_scatter_masked": "kernels.route",
    "ep_gather": "kernels.route",
    "grouped_gemm_contiguous": "kernels.grouped_gemm",
    "grouped_gemm_masked": "kernels.grouped_gemm",
    "swiglu_masked": "kernels.grouped_gemm",
    "gemm_of_copies": "kernels.gemv",
    "swiglu_of_copies": "kernels.gemv",
    "quantize_1x128": "kernels.quant",
    "silu_mul_quant": "kernels.quant",
    "silu_mul_quant_masked": "kernels.quant",
    "gemm_fp8": "kernels.gemm",
    "grouped_gemm_contiguous_fp8": "kernels.grouped_gemm",
    "grouped_gemm_masked_fp8": "kernels.grouped_gemm",
    "pack_pages": "kernels.pages",
    "unpack_pages": "kernels.pages",
}
PREFERENCE = dict.fromkeys(OURS, ("triton", "torch")) | {
    "prefill_attention": ("flash_attn", "triton", "torch"),
    "mla_decode": ("flash_mla", "triton", "torch"),
    "grouped_gemm_contiguous": ("deep_gemm", "triton", "torch"),
    "grouped_gemm_masked": ("triton", "deep_gemm", "torch"),  # ours is faster for a decode step's few rows
    "swiglu_masked": ("triton", "deep_gemm", "torch"),
    "gemm_fp8": ("deep_gemm", "triton", "torch"),
    "grouped_gemm_contiguous_fp8": ("deep_gemm", "triton", "torch"),
    "grouped_gemm_masked_fp8": ("deep_gemm", "triton", "torch"),
}
LIBRARIES = ("flash_attn", "flash_mla", "deep_gemm", "triton", "torch")
NO_GPU = "no GPU"
MODULES = {"flash_attn": "flash_attn.cute"}  # library -> the module to import, where the names differ


def choose(
    shape: Shape, dtype: torch.dtype, device: torch.device, forced: Iterable[str] = ()
) -> tuple[Ops, list[Choice]]:
    """Choose the ops for a model on a device.

    `forced` holds words: `op=library`; `library`, for every op that it serves; `auto`, which forces nothing. A word for
    one op overrides a word for all. Raises ValueError if a forced library cannot serve.
    """
    by_op = _parse_forced(forced)
    chosen, choices = {}, []
    for op, order in PREFERENCE.items():
        if op in by_op:
            order = [by_op[op][0]]
        obstacles = []
        for library in order:
            obstacle = _obstacle(library, shape, dtype, device)
            if obstacle is None:
                break
            obstacles.append(f"{library}: {obstacle}")
        else:
            raise ValueError(f"--backend {by_op[op][1]}: {obstacles[-1]}")
        chosen[op] = _load(op, library)
        forced_why = "forced" if op in by_op else ""
        why = NO_GPU if device.type != "cuda" and obstacles else "; ".join(obstacles)
        choices.append(Choice(op, library, why or forced_why))
    padded = any(call is not getattr(ref, op) for op, call in chosen.items() if op.startswith("grouped_gemm"))
    return Ops(
        **chosen,
        decode_plan=_beside(chosen["mla_decode"], "decode_plan", ref.decode_plan),
        leave_sms=_beside(chosen["gemm_fp8"], "leave_sms", nullcontext),
        capturable=frozenset(
            kind for kind, waiting in ref.WAITING.items() if not any(chosen[op] is getattr(ref, op) for op in waiting)
        ),
        whole_keys=_beside(chosen["prefill_attention"], "WHOLE_KEYS", False),
        alignment=ALIGNMENT if padded else 1,
        by_rows=any(_beside(call, "BY_ROWS", False) for op, call in chosen.items() if "contiguous" in op),
    ), choices


def _beside(op: Callable, name: str, default: Any) -> Any:
    """Return the attribute `name` of the module that defines `op`, or `default`."""
    return getattr(importlib.import_module(op.__module__), name, default)


def table(choices: list[Choice]) -> str:
    """Return one line per library and reason: its ops, and why no preferred library serves them."""
    lines: dict[tuple[str, str], list[str]] = {}
    for choice in choices:
        lines.setdefault((choice.library, choice.why), []).append(choice.op)
    return "\n".join(f"{lib:>10}: {', '.join(ops)}" + (f" ({why})" if why else "") for (lib, why), ops in lines.items())


def _parse_forced(forced: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Map each forced op to its library and the word that forces it."""
    for_all, for_one = {}, {}
    for word in forced:
        if word == "auto":
            continue
        op, equals, library = word.rpartition("=")
        if library not in LIBRARIES:
            raise ValueError(f"--backend {word}: {library!r} is none of {', '.join(LIBRARIES)}")
        if not equals:
            for_all |= {op: (library, word) for op, order in PREFERENCE.items() if library in order}
        elif op not in PREFERENCE:
            raise ValueError(f"--backend {word}: {op!r} is none of {', '.join(PREFERENCE)}")
        elif library not in PREFERENCE[op]:
            raise ValueError(f"--backend {word}: {op} is served by {', '.join(PREFERENCE[op])}")
        else:
            for_one[op] = library, word
    return for_all | for_one


def _obstacle(library: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why a library cannot serve, or None if it can."""
    if library == "torch":
        return None
    if device.type != "cuda":
        return NO_GPU
    if library != "triton":
        if torch.cuda.get_device_capability(device) != (9, 0):
            return "needs Hopper"
        if dtype != torch.bfloat16:
            return f"needs bfloat16, not {str(dtype).removeprefix('torch.')}"
    if library == "flash_mla" and (shape.kv_lora_rank, shape.rope_dim) != (512, 64):
        return f"needs latent 512 + rope 64, not {shape.kv_lora_rank} + {shape.rope_dim}"
    if library == "flash_attn" and (shape.qk_head_dim, shape.v_head_dim) != (192, 128):
        return f"needs head dims 192 and 128, not {shape.qk_head_dim} and {shape.v_head_dim}"
    if library == "deep_gemm" and (shape.hidden % 128 or shape.expert_width % 128):
        return f"needs widths in 128s, not {shape.hidden} and {shape.expert_width}"
    try:
        module = importlib.import_module(MODULES.get(library, library))
    except Exception as error:  # a library may fail in its own way: no compiler, another torch
        return f"does not import ({type(error).__name__}: {error})"
    if library == "deep_gemm" and not hasattr(module, "set_pdl"):
        return f"{getattr(module, '__version__', 'this version')} is too old: it has no set_pdl"
    return None


def _load(op: str, library: str) -> Callable:
    match library:
        case "torch":
            return getattr(ref, op)
        case "triton":
            module = importlib.import_module(OURS[op])
            keys = importlib.import_module("kernels.triton_keys")
            keys.hash_triton()
            keys.settle(module)
            return getattr(module, op)
        case _:
            return getattr(importlib.import_module(f"kernels.{library}_ops"), op)
