"""EngineConfig: an engine's settings from the command line, and the rules for their values."""

import os
from argparse import Namespace
from dataclasses import dataclass, field, fields
from pathlib import Path

from disagg.buckets import PromptSize, make_prompt_sizes
from disagg.request import MOST_DRAFTS
from model.config import ModelConfig
from model.pages import PAGE

DISPATCH = "dispatch="  # among the values of --backend
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Rebalance:
    """When experts move while serving. Raises ValueError, which names the flag."""

    interval: int = 0  # steps between looks at the balance; 0: experts never move
    threshold: float = 1.0  # balancedness above which nothing moves
    layers_per_step: int = 1  # layers whose experts move at once

    def __post_init__(self) -> None:
        if self.interval < 0:
            raise ValueError(f"--rebalance: the interval is {self.interval}; it must be at least 0")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"--rebalance: the balancedness is {self.threshold}; it must be in (0, 1]")
        if self.layers_per_step < 1:
            raise ValueError(f"--rebalance: the layers at once are {self.layers_per_step}; they must be at least 1")

    @classmethod
    def parse(cls, text: str) -> "Rebalance":
        """Parse `INTERVAL[,THRESHOLD[,LAYERS]]`. Raises ValueError."""
        try:
            match text.split(","):
                case [interval]:
                    return cls(int(interval))
                case [interval, threshold]:
                    return cls(int(interval), float(threshold))
                case [interval, threshold, layers]:
                    return cls(int(interval), float(threshold), int(layers))
            raise ValueError("too many numbers")
        except ValueError as error:
            if str(error).startswith("--"):
                raise
            raise ValueError(f"--rebalance is {text!r}; it must be N, N,B or N,B,L, all of them numbers") from None


@dataclass(frozen=True)
class EngineConfig:
    """An engine's settings. Sizes are per attention replica. Raises ValueError, which names the flag."""

    max_batch: int = 64
    max_tokens_per_step: int = 1024
    kv_tokens: int | None = None  # None: as many as fit on a GPU; 65,536 on a CPU
    max_model_len: int | None = None  # None: the model's max_position_embeddings
    load: str = "weights"  # of the checkpoint; or "dummy": random ones
    dtype: str = "auto"
    dispatch: str = "auto"
    decodes: bool = True  # False for a prefill job
    graphs: str = "auto"  # CUDA graphs for the steps that allow it (`captures.py`); or "off"
    overlap: str = "auto"
    speculate: int = 0  # N: drafts per step by the multi-token-prediction layer, at most
    adapts: bool = False  # a decode step has 0 to N drafts, whatever pays best
    redundant_experts: int = 0  # slots of the job beyond one per expert
    expert_map: str | None = None  # path of a recording to balance for
    record_experts: str | None = None  # path of a recording to write
    rebalance: Rebalance = field(default_factory=Rebalance)
    prefix_cache: str = "auto"  # pages keep their KV for other requests; or "off"
    gpu_memory_fraction: float = 0.9  # per GPU, for all ranks of this job on it

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_tokens_per_step", "max_model_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if not 0 <= self.speculate <= MOST_DRAFTS:
            raise ValueError(f"--speculate is {self.speculate}; it must be in 0..{MOST_DRAFTS}")
        if self.adapts and not self.speculate:
            raise ValueError(f"--speculate is auto:0; it must be in auto:1..auto:{MOST_DRAFTS}")
        if self.kv_tokens is not None and self.kv_tokens < PAGE:
            raise ValueError(f"--kv-tokens is {self.kv_tokens}; it must be at least a page of {PAGE}")
        if self.redundant_experts < 0:
            raise ValueError(f"--redundant-experts is {self.redundant_experts}; it must be at least 0")
        if self.record_experts is not None:
            path = Path(self.record_experts).absolute()
            if path.is_dir():
                raise ValueError(f"--record-experts {self.record_experts!r}: it is a folder")
            if not path.parent.is_dir():
                raise ValueError(f"--record-experts {self.record_experts}: no such folder")
            if not os.access(path.parent, os.W_OK):
                raise ValueError(f"--record-experts {self.record_experts}: its folder cannot be written to")
        if not 0 < self.gpu_memory_fraction <= 1:
            raise ValueError(f"--gpu-memory-fraction is {self.gpu_memory_fraction}; it must be in (0, 1]")

    @classmethod
    def from_flags(cls, args: Namespace) -> "EngineConfig":
        """Take run.py's flags. A flag sets the field of the same name; `--backend dispatch=X` sets `dispatch`."""
        given = {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}
        chosen = [text.removeprefix(DISPATCH) for text in args.backend if text.startswith(DISPATCH)]
        given |= {"decodes": args.role != "prefill", "rebalance": Rebalance.parse(args.rebalance)}
        given["speculate"], given["adapts"] = parse_speculate(args.speculate)
        return cls(**given, dispatch=chosen[-1] if chosen else "auto")

    @property
    def drafts_per_step(self) -> range:
        """Return the numbers of drafts that a step may make. A prefill job always makes N."""
        return range(0 if self.adapts and self.decodes else self.speculate, self.speculate + 1)

    def model_len(self, model: ModelConfig) -> int:
        limit = self.max_model_len or model.max_position_embeddings
        if limit > model.max_position_embeddings:
            raise ValueError(
                f"--max-model-len ({limit}) is over the model's max_position_embeddings "
                f"({model.max_position_embeddings})"
            )
        return limit

    def longest(self, model: ModelConfig) -> int:
        """Return the most tokens of KV that a request can have, as far as it is known before there is a pool."""
        return min(self.model_len(model), self.kv_tokens or self.model_len(model))

    def rows(self, sequences: int) -> int:
        """Return the most tokens of so many sequences in a decode step, and rows of logits in any step."""
        return sequences * (1 + self.speculate if self.decodes else 1)

    def prompt_sizes(self, model: ModelConfig) -> tuple[PromptSize, ...]:
        """Return the sizes, ascending, of the steps of prompts that a rank may capture (`captures.py`).

        They see no more than the largest step, for which the activations have room.
        """
        longest, most = self.longest(model), self.max_tokens_per_step
        return make_prompt_sizes(min(most, self.max_batch * longest), most + longest)

    def positions(self, model: ModelConfig) -> int:
        """Return the length of tables by position.

        With N drafts, a request's steps may go further than its end. The last one begins before its last token, and
        one more may follow unseen. Each goes N + 1 positions further, and their drafts less than that.
        """
        return self.model_len(model) + (3 * (self.speculate + 1) if self.speculate else 0)


def parse_speculate(text: str) -> tuple[int, bool]:
    """Parse `N`, `auto` or `auto:N`: return N, and whether steps may have fewer drafts. Raises ValueError."""
    number, adapts = text.removeprefix("auto:"), text.startswith("auto")
    try:
        return (MOST_DRAFTS if text == "auto" else int(number)), adapts
    except ValueError:
        raise ValueError(f"--speculate is {text!r}; it must be N, auto or auto:N, with a number N") from None
