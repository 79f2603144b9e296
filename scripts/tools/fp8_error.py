"""Measure the error of block-fp8 weights on model/tiny: the mean absolute change of log probabilities, on a CPU.

    python -m scripts.tools.fp8_error --out measurements.json

This is the error of the weights alone: both models compute in float32. An fp8 checkpoint of tiny always runs
dequantised, because its expert width of 32 is not a multiple of the block of 128. The reference is the error of bf16
arithmetic with the bf16 weights. The text is the part of Python's standard library that training held out. Training
used the files of Python 3.11, so run this on 3.11.
"""

import argparse
import sysconfig
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from disagg.config import EngineConfig
from disagg.engine import Engine
from disagg.front.tokenizer import load_tokenizer
from kernels.ops import Ops
from model.batch import Batch, Chunk
from model.config import ModelConfig
from model.pages import PAGE
from model.precision import decide
from parallel.mesh import Mesh
from scripts.bench.lib.flags import new_file
from scripts.bench.lib.measurements import Measurement, save
from scripts.tools.quantize import quantize_folder
from scripts.tools.tiny_text import python_documents

TINY = Path(__file__).parents[2] / "model" / "tiny"
LENGTH = 512  # tokens per file
NAME = "tiny with fp8 weights (dequantised), mean absolute difference of log probabilities"


def logprobs(folder: Path, texts: list[list[int]], dtype: str) -> Tensor:
    """Return the log probability of each token of the texts. The first token of a text has none."""
    settings = EngineConfig(max_batch=1, kv_tokens=LENGTH, dtype=dtype)
    engine = Engine.from_pretrained(settings, ModelConfig.from_pretrained(folder), folder, Mesh(), Ops())
    why = decide(engine.config, 1, engine.model.dtype, engine.mesh.device).why
    print(f"{folder.name} in {dtype}; fp8: {why}", flush=True)
    found = []
    for ids in texts:
        batch = Batch.build([], [Chunk(ids, 0, list(range(1, 1 + LENGTH // PAGE)))], "cpu")
        batch = replace(batch, logit_rows=torch.arange(len(ids) - 1))
        logits = engine.model(batch, engine.pool, engine.dispatchers.contiguous)
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]))
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=new_file, metavar="FILE", help="write the figure to FILE as JSON")
    args = parser.parse_args()
    encoder = load_tokenizer(TINY)
    held_out = [text for text, is_held_out in python_documents(Path(sysconfig.get_path("stdlib"))) if is_held_out]
    texts = [encoder.text(text)[:LENGTH] for text in held_out]
    with tempfile.TemporaryDirectory() as scratch:
        fp8 = Path(scratch) / "tiny-fp8"
        quantize_folder(TINY, fp8)
        exact, rounded = (logprobs(TINY, texts, dtype) for dtype in ("float32", "bfloat16"))
        quantised = logprobs(fp8, texts, "float32")
    error, bf16 = ((other - exact).abs().mean().item() for other in (quantised, rounded))
    source = "bf16 arithmetic with bf16 weights, same text"
    record = Measurement(NAME, round(error, 4), "nat", "lower", round(bf16, 4), source)
    loss, change = -exact.mean().item(), (exact - quantised).mean().item()
    print(f"{len(exact)} tokens of {len(texts)} files, loss {loss:.3f}, with fp8 weights {change:+.4f}")
    print(f"{record.name}: {record.value} nat; {source}: {record.reference}")
    if args.out is not None:
        save([record], args.out)


if __name__ == "__main__":
    main()
