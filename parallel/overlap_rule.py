"""Which steps run as two halves (--overlap)."""

import math
from dataclasses import dataclass

# `auto` overlaps from this many tokens per rank on, in a decode step and in a step with prompts.
FEW_ROWS, FEW_TOKENS = 128, 4096
# It also wants this many rows per expert. In decode with fewer rows, an expert takes as long as reading its weights,
# which two halves do twice. The limit is an estimate: an H100 does about 1,400 TFLOP/s in fp8 and reads 3 TB/s,
# which balance at 233 rows. Measured: a loss with 16 to 32 rows. Simulated: a loss with 144, a gain with 288.
# In prefill, four H200s lost time with up to 512 rows, broke even with 1,024 and gained 1 % with 2,048.
DECODE_ROWS, PREFILL_ROWS = 256, 2048


@dataclass(frozen=True)
class Rule:
    """Decides which steps run as two halves (--overlap). All ranks decide alike, from numbers that they agreed on.

    `auto` does not overlap where it does not pay: with one rank, in small steps, and where experts get few rows. In a
    simulated deployment of 72 ranks, decode broke even between 64 and 128 tokens per rank: 144 to 288 rows per expert.
    """

    mode: str  # auto, on, off
    ep_size: int
    attn_tp: int
    share: float  # the fraction of the job's tokens that an expert gets (ModelConfig.expert_share)

    def in_decode(self, rows: int, each: int = 1) -> bool:
        """Return whether a decode step of `rows` sequences per replica, padding included, runs as two halves.

        Each half must divide over the attention group. `each`: tokens per sequence, with its drafts.
        """
        return self._wanted(rows * each, self._decode_from) and rows % (2 * self.attn_tp) == 0

    def row_multiple(self, rows: int, each: int = 1) -> int:
        """Return the number that a decode step's rows must be a multiple of, so that it can be divided.

        `each`: the most tokens per sequence.
        """
        return (2 if self._wanted(rows * each, self._decode_from) else 1) * self.attn_tp

    def in_prefill(self, tokens: int) -> bool:
        """Return whether a step with prompts runs as two halves. `tokens`: those of the fullest replica."""
        return self._wanted(tokens, self._prefill_from)

    def _wanted(self, tokens: int, least: int) -> bool:
        if self.mode == "auto":
            return not self._never and tokens // self.attn_tp >= least
        return self.mode == "on"

    @property
    def _decode_from(self) -> int:
        """Tokens per rank from which on `auto` overlaps a decode step."""
        return self._least(FEW_ROWS, DECODE_ROWS)

    @property
    def _prefill_from(self) -> int:
        return self._least(FEW_TOKENS, PREFILL_ROWS)

    def _least(self, few: int, rows_an_expert: int) -> int:
        return few if self._never else max(few, math.ceil(rows_an_expert / (self.ep_size * self.share)))

    @property
    def _never(self) -> str:
        """Why `auto` never overlaps; empty if it may."""
        return "one rank" if self.ep_size == 1 else "" if self.share else "no experts"

    @property
    def why(self) -> str:
        """The rule in words, for the log."""
        if self.mode != "auto":
            return self.mode
        if self._never:
            return f"off: {self._never}"
        return (
            f"in decode from {self._decode_from} rows a rank, in prefill from {self._prefill_from} tokens a rank; "
            f"off below"
        )
