"""Transport: the contract of what moves a link's bytes. A transport of another library implements these two classes.

Each link has a transport of its own, made by the link's thread at both ends. Member 0 is the prefill rank, member 1 the
decode rank. Several transfers may be under way at once; they complete in the order in which they were started, at both
ends. A transport must not need any collective of the job, and must be able to fail alone.

Two-sided transports (`transports/torch_dist.py`): the prefill end calls `send`, then says `Sending` over the pipe. Only
then does the decode end call `recv` with a tensor of the same shape, so that no receive waits for a send that never
comes.

One-sided transports (NIXL, Mooncake; not here yet): the decode end reads from a buffer that the prefill end registered,
because neither library can cancel a remote write. `send` registers the packed pages and returns a transfer that is
through when the peer says that it has read them. `Sending` then carries where they are, and `recv` reads. Only the
decode rank writes to decode's pages, as with the two-sided ones.
"""

from typing import Protocol

from torch import Tensor


class Transfer(Protocol):
    """A tensor on its way."""

    x: Tensor  # kept until it is through
    began: float  # of time.perf_counter

    def wait(self) -> None:
        """Return once the whole tensor is through: read at the sending end, complete at the receiving end.

        One thread calls it, once. After `Transport.abort` it returns or raises; with gloo, after the time-out.
        """
        ...


class Transport(Protocol):
    def greet(self) -> None:
        """Connect, if the library connects at the first transfer. Both ends call it once, before any transfer.

        Member 0 calls it only when member 1 is at the pipe, because a call that waits for an absent peer may not be
        abortable. Raises RuntimeError if the peer does not come in time.
        """
        ...

    def send(self, x: Tensor) -> Transfer:
        """Start to send `x`, once the current stream has written it. `x` may be overwritten when it is through.
        RuntimeError if the link is broken."""
        ...

    def recv(self, x: Tensor) -> Transfer:
        """Start to fill `x`, in the order of the peer's sends. Call it only for a send that was announced.
        RuntimeError if the link is broken."""
        ...

    def abort(self) -> None:
        """End what is under way, from any thread, more than once but not from two threads at a time. Afterwards no
        byte is written to a tensor that was given to `recv`, or that tensor is never used again."""
        ...
