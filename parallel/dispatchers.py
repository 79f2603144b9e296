"""Which dispatchers a job uses: DeepEP where it can serve, else the all-to-all; one rank alone sends nothing."""

import socket
from dataclasses import dataclass

import torch

from kernels.ops import Ops
from parallel.deepep import ContiguousDeepEP, DeepEPBuffer, MaskedDeepEP, obstacle
from parallel.dispatch import ContiguousAllToAll, LocalContiguous, LocalMasked, MaskedAllToAll
from parallel.mesh import Group, Mesh

CHOICES = ("auto", "deepep", "all_to_all")
Dispatcher = ContiguousAllToAll | MaskedAllToAll | LocalContiguous | LocalMasked | ContiguousDeepEP | MaskedDeepEP


@dataclass(frozen=True)
class Dispatchers:
    """One for each layout, of the same kind."""

    contiguous: ContiguousAllToAll | LocalContiguous | ContiguousDeepEP
    masked: MaskedAllToAll | LocalMasked | MaskedDeepEP
    why: str  # a line for the log: which, and why not another
    buffer: DeepEPBuffer | None = None

    @property
    def num_bytes(self) -> int:
        """GPU memory that stays allocated for communication, beside NCCL's."""
        return self.buffer.num_bytes if self.buffer is not None else 0

    def prepare_masked(self) -> None:
        """All ranks together, before a captured masked step is replayed: another step may have left something."""
        if self.buffer is not None:
            self.buffer.prepare_low_latency()

    def close(self) -> None:
        """All ranks together; see `DeepEPBuffer.close`."""
        if self.buffer is not None:
            self.buffer.close()


def make_dispatchers(
    choice: str,
    mesh: Mesh,
    ops: Ops,
    dtype: torch.dtype,
    *,
    num_slots: int,
    hidden: int,
    top_k: int,
    capacity: int,
    fp8: bool = False,
    most_copies: int | None = None,
) -> Dispatchers:
    """Every rank must call this: they agree on it.

    choice: `auto`, or what `--backend dispatch=...` forces. capacity: the most tokens a rank dispatches in a decode
    step. fp8: tokens travel quantised. most_copies: that a rank's experts take at once in prefill (None: all).
    ValueError if DeepEP is forced and cannot serve.
    """
    if choice not in CHOICES:
        raise ValueError(f"--backend dispatch={choice}: it is one of {', '.join(CHOICES)}")
    why_not = "forced"
    if choice != "all_to_all":
        mine = obstacle(mesh.ep.size, num_slots, hidden, top_k, capacity, dtype, mesh.device)
        obstacles, hosts = zip(*mesh.ep.exchange((mine, socket.gethostname())), strict=True)
        why_not = next((reason for reason in obstacles if reason), None)
        if why_not is None and len(set(hosts)) > 1:
            why_not = f"all ranks must be on one machine, not {len(set(hosts))}"
        if why_not is None:
            buffer = DeepEPBuffer(mesh.ep, num_slots, hidden, capacity)
            contiguous = ContiguousDeepEP(buffer, ops, most_copies)
            return Dispatchers(contiguous, MaskedDeepEP(buffer, fp8), "DeepEP", buffer)
        if choice == "deepep":
            raise ValueError(f"--backend dispatch=deepep: {why_not}")
        why_not = f"DeepEP: {why_not}"
    if mesh.ep.size == 1:
        return Dispatchers(*plain_dispatchers(mesh.ep, num_slots, ops), "none: one rank holds every expert")
    over = "NCCL" if mesh.device.type == "cuda" else "gloo"
    return Dispatchers(*plain_dispatchers(mesh.ep, num_slots, ops, most_copies), f"all-to-all over {over} ({why_not})")


def plain_dispatchers(
    group: Group, num_slots: int, ops: Ops, most_copies: int | None = None
) -> tuple[ContiguousAllToAll | LocalContiguous, MaskedAllToAll | LocalMasked]:
    """The contiguous and the masked one, without a library."""
    if group.size == 1:
        return LocalContiguous(num_slots, ops), LocalMasked(num_slots, ops)
    return ContiguousAllToAll(group, num_slots, ops, most_copies), MaskedAllToAll(group, num_slots, ops)
