"""Which library serves which op: chosen by what is installed, forced by name, or refused with the reason."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from kernels import ref
from kernels.backend import OURS, PREFERENCE, Shape, choose, table
from kernels.ops import Ops
from tests.conftest import ROOT

V3 = Shape(kv_lora_rank=512, rope_dim=64, qk_head_dim=192, v_head_dim=128, hidden=7168, expert_width=2048)
CPU = torch.device("cpu")


def test_a_cpu_runs_the_torch_twins() -> None:
    ops, choices = choose(V3, torch.float32, CPU, ["auto"])
    assert (ops, choices) == choose(V3, torch.float32, CPU)
    assert ops == Ops() and ops.alignment == 1
    assert {choice.library for choice in choices} == {"torch"}
    assert all(choice.why == "no GPU" for choice in choices)
    assert len(table(choices).splitlines()) == 1


def test_every_op_has_a_twin_a_kernel_and_a_row() -> None:
    names = {field.name for field in fields(Ops)} - {
        "alignment",
        "by_rows",
        "decode_plan",
        "leave_sms",
        "whole_keys",
        "capturable",
    }
    assert names == set(PREFERENCE) == set(OURS)
    assert all(callable(getattr(ref, name)) for name in names)
    assert all(order[-1] == "torch" and "triton" in order for order in PREFERENCE.values())


def signatures(path: Path) -> dict[str, list[tuple[str, str | None]]]:
    """(name, default) of each argument of each function in a file; read, because Triton is not there on a CPU."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            given = node.args
            arguments = [*given.posonlyargs, *given.args]
            defaults = [None] * (len(arguments) - len(given.defaults)) + [ast.unparse(d) for d in given.defaults]
            arguments, defaults = (
                arguments + given.kwonlyargs,
                defaults + [d and ast.unparse(d) for d in given.kw_defaults],
            )
            found[node.name] = [(a.arg, d) for a, d in zip(arguments, defaults, strict=True)]
    return found


def test_every_implementation_takes_its_twins_arguments() -> None:
    """Names and defaults: what is called by keyword on one library must be so on all."""
    twins = signatures(ROOT / "kernels" / "ref.py") | signatures(ROOT / "kernels" / "fp8.py")
    twins |= signatures(ROOT / "kernels" / "ref_attention.py")
    compared = set()
    for op, order in PREFERENCE.items():
        homes = {"triton": OURS[op]} | {
            library: f"kernels.{library}_ops" for library in order[:-1] if library != "triton"
        }
        for library, module in homes.items():
            theirs = signatures(ROOT / (module.replace(".", "/") + ".py"))[op]
            assert theirs == twins[op], f"{op} of {library}: {theirs}, its twin has {twins[op]}"
            compared.add((op, library))
    assert len(compared) == 32 + 8  # a Triton kernel for each, and the vendors'


def test_a_rehearsal_runs_every_kernel_that_places_tokens() -> None:
    """What ranks exchange, and how many rows the host makes, depends on them."""
    functions = {node.name: node for node in ast.walk(ast.parse((ROOT / "kernels" / "route.py").read_text()))
                 if isinstance(node, ast.FunctionDef)}  # fmt: skip
    launched = {
        call.func.value.id
        for name in ("ep_scatter", "ep_scatter_masked")
        for call in ast.walk(functions[name])
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript) and isinstance(call.func.value, ast.Name)
    }
    ahead = (ROOT / "kernels" / "triton_ahead.py").read_text()
    assert len(launched) == 5 and launched == set(re.findall(r"^    route\.(\w+),$", ahead, re.MULTILINE))


@pytest.mark.parametrize(
    ("forced", "message"),
    [
        ("mla_decode=flash_mla", "--backend mla_decode=flash_mla: flash_mla: no GPU"),
        ("absorb_query=triton", "--backend absorb_query=triton: triton: no GPU"),
        ("rms_norm=deep_gemm", "--backend rms_norm=deep_gemm: rms_norm is served by triton, torch"),
        ("rms_norm=cuda", "--backend rms_norm=cuda: 'cuda' is none of flash_attn, flash_mla, deep_gemm, triton, torch"),
        ("attention=torch", "--backend attention=torch: 'attention' is none of rms_norm, "),
        ("", "--backend : '' is none of"),
        ("=torch", "--backend =torch: '' is none of rms_norm, "),
        ("triton", "--backend triton: triton: no GPU"),
        ("deep_gemm", "--backend deep_gemm: deep_gemm: no GPU"),
    ],
)
def test_what_cannot_be_forced_is_refused(forced: str, message: str) -> None:
    with pytest.raises(ValueError, match="^--backend") as error:
        choose(V3, torch.float32, CPU, [forced])
    assert message in str(error.value)


def test_an_ops_own_word_goes_before_one_for_all() -> None:
    for words in (["triton", "deep_gemm"], ["deep_gemm", "triton"]):
        own = [f"{op}=torch" for op in PREFERENCE]
        ops, choices = choose(V3, torch.float32, CPU, [*own, *words])
        assert ops == Ops() and all((choice.library, choice.why) == ("torch", "forced") for choice in choices)


def test_the_table_names_every_op_once() -> None:
    text = table(choose(V3, torch.float32, CPU, ["torch"])[1])
    assert all(len(re.findall(rf"\b{op}\b", text)) == 1 for op in PREFERENCE)
    assert "(forced)" in text
