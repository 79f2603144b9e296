"""What a job captures as CUDA graphs: its decode steps, and its steps with few prompt tokens and no others."""

from dataclasses import dataclass

from disagg.buckets import PromptSize
from disagg.config import EngineConfig
from kernels.ops import Ops
from model.config import ModelConfig
from parallel.mesh import Mesh

WAITS = "torch serves ops that wait for the host"


@dataclass(frozen=True)
class Captures:
    decodes: bool
    prompts: tuple[PromptSize, ...]  # ascending
    why: str  # for the log: what is captured, and why the rest is not; empty on a CPU

    @classmethod
    def of(cls, settings: EngineConfig, config: ModelConfig, mesh: Mesh, ops: Ops) -> "Captures":
        """Decide what to capture. All ranks of a job decide alike."""
        if mesh.device.type != "cuda":
            return cls(False, (), "")
        if settings.graphs == "off":
            return cls(False, (), "none: --graphs off")
        decodes, prompts, said = settings.decodes and "decodes" in ops.capturable, (), []
        if settings.decodes:
            said.append("decode steps" if decodes else f"not decode steps: {WAITS}")
        if mesh.size > 1:
            said.append("not prompts: only a job of one rank can")
        elif "prompts" not in ops.capturable:
            said.append(f"not prompts: {WAITS}")
        else:
            prompts = settings.prompt_sizes(config)
            said.append(f"up to {prompts[-1].tokens:,} tokens of prompts")
        return cls(decodes, prompts, "; ".join(said))
