"""The choice of a job's dispatchers: DeepEP where it can serve, else the all-to-all. A single rank sends nothing."""

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
    """One dispatcher per layout, both of the same kind."""

    contiguous: ContiguousAllToAll | LocalContiguous | ContiguousDeepEP
    masked: MaskedAllToAll | LocalMasked | MaskedDeepEP
    why: str  # for the log: the kind, and why it is no other
    buffer: DeepEPBuffer | None = None

    @property
    def num_bytes(self) -> int:
        """GPU memory that stays allocated for communication, not counting NCCL's."""
        return self.buffer.num_bytes if self.buffer is not None else 0

    def prepare_masked(self) -> None:
        """Prepare for the replay of a captured masked step: earlier steps may have used its memory. Collective."""
        if self.buffer is not None:
            self.buffer.prepare_low_latency()

    def close(self) -> None:
        """Free the memory; see `DeepEPBuffer.close`. Collective."""
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
    """Choose and create a job's dispatchers. Collective: all ranks make the same choice.

    `choice`: `auto`, or the value of `--backend dispatch=...`. `capacity`: the most tokens that a rank dispatches in a
    decode step. `fp8`: tokens travel quantised. `most_copies`: how many copies a rank's experts take at once in prefill
    (None: all). Raises ValueError if DeepEP is forced and cannot serve.
    """
    if choice not in CHOICES:
        raise ValueError(f"--backend dispatch={choice}: it is one of {', '.join(CHOICES)}")
    why_not = "forced"
    if choice != "all_to_all":
        my_obstacle = obstacle(mesh.ep.size, num_slots, hidden, top_k, capacity, dtype, mesh.device)
        obstacles, hosts = zip(
            *mesh.ep.exchange((my_obstacle, socket.gethostname()), tuple[str | None, str]), strict=True
        )
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
    """Return the contiguous and the masked dispatcher that need no library."""
    if group.size == 1:
        return LocalContiguous(num_slots, ops), LocalMasked(num_slots, ops)
    return ContiguousAllToAll(group, num_slots, ops, most_copies), MaskedAllToAll(group, num_slots, ops)
