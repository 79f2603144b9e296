"""Transport: the interface that moves a link's bytes. To support another library, implement these two classes.

Each link has its own transport, made by the link's thread at both ends. Member 0 is the prefill rank, member 1 the
decode rank. Several transfers may be in flight. They complete in the order in which they were started, at both ends.
A transport must not need any collective of the job, and must be able to fail alone.

Two-sided transports (`transports/torch_dist.py`): the prefill end calls `send`, then sends `Sending` over the pipe.
Only then does the decode end call `recv` with a tensor of the same shape. So no receive waits for a send that never
comes.

One-sided transports (NIXL, Mooncake; not implemented yet): the decode end reads from a buffer that the prefill end has
registered. It reads because neither library can cancel a remote write. `send` registers the packed pages. Its transfer
completes when the peer reports that it has read them. `Sending` then carries their location, and `recv` reads. As with
two-sided transports, only the decode rank writes to its own pages. These two classes do not suffice for that yet:
docs/design.md lists what else must change.
"""

from typing import Protocol

from torch import Tensor


class Transfer(Protocol):
    """A tensor in flight."""

    x: Tensor  # kept alive until the transfer has completed
    began: float  # time.perf_counter()

    def wait(self) -> None:
        """Wait for the transfer to complete: the tensor has been read at the sending end, or filled at the receiving.

        Called once, by one thread. After `Transport.abort` it returns or raises; with gloo, after the time-out.
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
        """Start to send `x`, after the work queued on the current stream. Overwrite `x` only after its completion.

        Raises RuntimeError if the link is broken.
        """
        ...

    def recv(self, x: Tensor) -> Transfer:
        """Start to fill `x`. Receives match the peer's sends in order. Call it only for an announced send.

        Raises RuntimeError if the link is broken.
        """
        ...

    def abort(self) -> None:
        """End all transfers in flight. Any thread may call it, repeatedly, but not two threads at a time.

        Afterwards no tensor given to `recv` is written. With gloo one may still be, until the time-out. It then stays
        allocated until it is complete, and nothing reads it.
        """
        ...
