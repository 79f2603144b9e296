"""Convert a bf16 checkpoint to block fp8, in DeepSeek-V3's own format.

    python -m scripts.tools.quantize model/tiny /tmp/tiny-fp8

Every projection matrix becomes e4m3, with one float32 scale per block of 128x128, stored as `NAME_scale_inv`. That is
attention, dense FFN, routed and shared experts, in the MTP layer too. Embedding, head, norms and gates stay unchanged.
The other files are copied, and `quantization_config` is added to config.json.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from kernels.fp8 import quantize_128x128
from model.config import ModelConfig

QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def is_projection(name: str) -> bool:
    return (
        name.startswith("model.layers.")
        and name.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight"))
        and "eh_proj" not in name
    )


def quantize_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of one file by name, with its projections quantised and their scales added."""
    out = {}
    for name, tensor in tensors.items():
        if is_projection(name):
            out[name], out[f"{name}_scale_inv"] = quantize_128x128(tensor)
        else:
            out[name] = tensor
    return out


def quantize_folder(source: Path, target: Path) -> None:
    """Write the fp8 checkpoint of `source` to `target`.

    Raises ValueError if `source` is not a checkpoint or already in fp8, or if `target` is not empty.
    """
    if ModelConfig.from_pretrained(source).fp8:
        raise ValueError(f"{source}: it is in fp8 already")
    paths = sorted(source.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{source}: it has no safetensors file")
    target.mkdir(parents=True, exist_ok=True)
    if any(target.iterdir()):
        raise ValueError(f"{target}: it is not empty")
    weight_map, total = {}, 0
    for path in tqdm(paths, unit="file", disable=None):
        try:
            with safe_open(path, "pt") as file:
                tensors = quantize_tensors({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: {error}") from None
        save_file(tensors, target / path.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
        total += sum(t.nbytes for t in tensors.values())
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy(path, target / path.name)
    if (source / "model.safetensors.index.json").exists():
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": QUANTIZATION}
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the folder of a bf16 checkpoint")
    parser.add_argument("target", type=Path, help="a folder that is empty or does not exist")
    args = parser.parse_args()
    try:
        with torch.inference_mode():
            quantize_folder(args.source, args.target)
    except (ValueError, OSError) as error:
        print(f"quantize.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
