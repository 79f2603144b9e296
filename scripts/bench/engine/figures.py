"""The figures of the engine's benchmark, and what each is put beside."""

from typing import NamedTuple

from scripts.bench.lib import roofline
from scripts.bench.lib.measurements import Measurement, Report


class Drafting(NamedTuple):
    """How an engine drafts."""

    most: int = 0  # drafts per step
    adapts: bool = False  # a step may have fewer

    def __str__(self) -> str:
        return f"auto:{self.most}" if self.adapts else str(self.most)


class EngineReport(Report):
    """The figures, with rooflines, a peer's rates, and the rates without drafts as references."""

    def __init__(
        self, shape: str, ceilings: roofline.Ceilings | None, peers: dict[Drafting, dict], ranks: int, rank: int
    ) -> None:
        """`peers`: a peer's figures, by how it drafts."""
        super().__init__(rank)
        self.shape, self.ceilings, self.peers, self.ranks = shape, ceilings, peers, ranks
        self.drafting, self.label = Drafting(), ""
        self.plain: dict[str, float] = {}  # rates without drafts, by name
        if ceilings is not None:
            self.add("bf16 GEMM 8192^3, a ceiling of the roofline", ceilings.bf16 / 1e12, "TFLOP/s")
            if ceilings.fp8 is not None:
                self.add("fp8 GEMM 8192^3, a ceiling of the roofline", ceilings.fp8 / 1e12, "TFLOP/s")
            self.add("copy, a ceiling of the roofline", ceilings.bandwidth / 1e12, "TB/s")

    def begin(self, drafting: Drafting, accept: float) -> None:
        """Let the next figures be those of an engine that drafts so."""
        self.drafting = drafting
        self.label = f", drafts: {drafting}, forced acceptance {accept:g}" if drafting.most else ""

    def add(self, name: str, value: float, unit: str, reference: float | None = None, source: str = "") -> None:
        better, reference = "lower" if unit == "ms" else "higher", reference and round(reference, 3)
        self.keep(Measurement(f"{self.shape}, {name}{self.label}", round(value, 3), unit, better, reference, source))

    def rate(self, phase: str, batch: int, name: str, value: float, work: roofline.Cost) -> None:
        """Add a rate in tokens per second, with the roofline and the peer's rate as references.

        Where the number of drafts varies, no roofline is known.
        """
        if self.ceilings is None or self.drafting.adapts:
            self.add(name, value, "tok/s")
        else:
            modelled = self.ranks * work.rate(self.ceilings)
            self.add(name, value, "tok/s", modelled, "roofline, same run (modelled)")
        if not self.drafting.most:
            self.plain[name] = value
        else:
            self.add(f"{name}, against no drafts", value, "tok/s", self.plain[name], "no drafts, same run")
        of_peer = self.peers.get(self.drafting)
        theirs = of_peer and of_peer[phase][str(batch)]
        if of_peer and theirs:
            peer = of_peer["peer"]
            self.add(f"{name}, against {peer.split()[0]}", value, "tok/s", theirs, f"{peer}, same run")
