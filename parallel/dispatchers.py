"""The choice of a job's dispatchers: DeepEP where it can serve, else the all-to-all. A single rank sends nothing.

The masked layout decides: DeepEP serves a job if low latency can serve its decode steps. Normal mode knows fewer
numbers of ranks. Where it does not know the job's, the all-to-all serves the contiguous layout. A job that only
prefills would gain nothing then, so the all-to-all serves it altogether.
"""

from dataclasses import dataclass

import torch

from kernels.ops import Ops
from parallel.deepep import ContiguousDeepEP, DeepEPBuffer, MaskedDeepEP, obstacles
from parallel.deepep_sizes import Sizes, described, normal_misfits
from parallel.dispatch import ContiguousAllToAll, LocalContiguous, LocalMasked, MaskedAllToAll
from parallel.mesh import Group, Mesh

CHOICES = ("auto", "deepep", "all_to_all")
Dispatcher = ContiguousAllToAll | MaskedAllToAll | LocalContiguous | LocalMasked | ContiguousDeepEP | MaskedDeepEP


@dataclass(frozen=True)
class Dispatchers:
    """One dispatcher per layout."""

    contiguous: ContiguousAllToAll | LocalContiguous | ContiguousDeepEP
    masked: MaskedAllToAll | LocalMasked | MaskedDeepEP
    why: str  # for the log: the kinds, and why they are no others
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
    drafts: int = 0,
    fp8: bool = False,
    most_copies: int | None = None,
    decodes: bool = True,
) -> Dispatchers:
    """Choose and create a job's dispatchers. Collective: all ranks make the same choice.

    `choice`: `auto`, or the value of `--backend dispatch=...`. `capacity`: the most tokens that a rank dispatches in a
    decode step, 1 + `drafts` of each sequence. `fp8`: tokens travel quantised. `most_copies`: how many copies a rank's
    experts take at once in prefill (None: all). `decodes`: False for a job that only prefills. Raises ValueError if
    DeepEP is forced and cannot serve, with every rule that fails.
    """
    if choice not in CHOICES:
        raise ValueError(f"--backend dispatch={choice}: it is one of {', '.join(CHOICES)}")
    if mesh.ep.size == 1 and choice != "deepep":
        return Dispatchers(*plain_dispatchers(mesh.ep, num_slots, ops), "none: one rank holds every expert")
    plain = f"all-to-all over {'NCCL' if mesh.device.type == 'cuda' else 'gloo'}"
    if choice == "all_to_all":
        return Dispatchers(*plain_dispatchers(mesh.ep, num_slots, ops, most_copies), f"{plain} (forced)")
    name = str(dtype).removeprefix("torch.")
    sizes = Sizes(mesh.ep.size, mesh.ranks_per_node, num_slots, hidden, top_k, capacity, name, drafts)
    failed = _of_all_ranks(mesh.ep.exchange(obstacles(sizes, mesh.device, decodes), list[str]))
    if failed and choice == "deepep":
        raise ValueError(f"--backend dispatch=deepep: {failed}")
    contiguous, masked = plain_dispatchers(mesh.ep, num_slots, ops, most_copies)
    if failed:
        return Dispatchers(contiguous, masked, f"{plain} (DeepEP: {failed})")
    normal = not normal_misfits(sizes)
    buffer = DeepEPBuffer(mesh.ep, num_slots, hidden, capacity, normal=normal)
    if normal:
        contiguous = ContiguousDeepEP(buffer, ops, most_copies)
    return Dispatchers(contiguous, MaskedDeepEP(buffer, fp8), described(sizes, plain), buffer)


def _of_all_ranks(rules: list[list[str]]) -> str:
    """Return the rules that fail on any rank, in one line. One that does not fail on all names the first such rank."""
    found = dict.fromkeys(rule for of_rank in rules for rule in of_rank)
    fails = {rule: [rank for rank, of_rank in enumerate(rules) if rule in of_rank] for rule in found}
    return "; ".join(rule if len(at) == len(rules) else f"{rule} (rank {at[0]})" for rule, at in fails.items())


def plain_dispatchers(
    group: Group, num_slots: int, ops: Ops, most_copies: int | None = None
) -> tuple[ContiguousAllToAll | LocalContiguous, MaskedAllToAll | LocalMasked]:
    """Return the contiguous and the masked dispatcher that need no library."""
    if group.size == 1:
        return LocalContiguous(num_slots, ops), LocalMasked(num_slots, ops)
    return ContiguousAllToAll(group, num_slots, ops, most_copies), MaskedAllToAll(group, num_slots, ops)
