"""Transport: what moves a link's bytes. To support another library, implement these three classes.

A process makes one Endpoint. Each link makes its own Transport of it, in the link's thread and at both ends. Member 0
is the prefill rank, member 1 the decode rank. Several transfers may be in flight. They complete in the order in which
they were started, at both ends. A transport must not need any collective of the job, and must be able to fail alone.

    two-sided (torch)                  prefill                            decode
                                       send: the bytes leave
                                       Sending -------------------------> recv: they are received
                                       complete when they have left       complete when they are there

    one-sided (NIXL, Mooncake)         send: nothing moves
                                       Sending(location) ---------------> recv: starts to read them from there
                                       was_read: complete <-------- Read  complete when they are there
                                       Last or Closed, after all Reads -> the room ends

Only the decode rank writes to its own pages. With a one-sided library it reads the bytes, because neither library can
cancel a transfer: so the end whose memory is written knows when nothing writes it any more. No memory of either end is
ever written by the other one.

It reads packed pages from prefill's buffer into one of its own, and unpacks them. Or it reads in place, from prefill's
pool straight into its own. NIXL does so in host memory, where each copy by the CPU costs as much as the read itself.

A one-sided send that was aborted gives its memory away, though the peer may still read it. Then the peer reads other
bytes, but it hears no last word on the room: that is said only when it has read everything. So it ends the room with an
error, which is not that of a checksum.
"""

import datetime
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage] - as in disagg/handoff/connect.py

TIMEOUT = datetime.timedelta(seconds=60)  # for the two sides to meet, and for each transfer


class Transfer(Protocol):
    """Bytes in flight. It keeps their memory alive until it has completed."""

    nbytes: int
    began: float  # time.perf_counter()

    def wait(self) -> None:
        """Wait for the transfer to complete: its memory may be overwritten, or it is filled.

        Called once, by one thread. Raises RuntimeError if it fails. When this has returned or raised, nothing writes
        the memory any more. So after `Transport.abort` a receive may still wait: with gloo for its time-out, with a
        one-sided library until the library is done with it.
        """
        ...


class Transport(Protocol):
    one_sided: bool  # the decode end reads, and says `Read`
    in_place: bool  # pages go from pool to pool, and nothing is packed: `buffer` is not for it; one-sided only

    def greet(self) -> None:
        """Connect, if the library connects at the first transfer. Both ends call it once, before any transfer.

        Member 0 calls it only when member 1 is at the pipe, because a call that waits for an absent peer may not be
        abortable. Raises RuntimeError if the peer does not come in time.
        """
        ...

    def buffer(self, credit: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an empty contiguous tensor for `send` or `recv`. `credit`: the transfer's.

        A one-sided transport has registered memory for each credit, so the tensor is in use as long as the credit.
        """
        ...

    def send(self, x: Tensor, pages: list[int] | None = None) -> tuple[Transfer, bytes]:
        """Start to send x [layers, n, ..], after the work queued on the current stream.

        `pages`: send only these pages of x, the pool. None: all, and x is contiguous. A transport that is not
        `in_place` sends only whole tensors, of `buffer`. Overwrite what is sent only after the completion.

        Returns the transfer, and the location of the bytes for the peer's `recv`: b"" if the transport is two-sided.
        Raises RuntimeError if the link is broken.
        """
        ...

    def recv(self, x: Tensor, location: bytes, pages: list[int] | None = None) -> Transfer:
        """Start to fill x [layers, n, ..]. Receives match the peer's sends in order.

        Call it only for an announced send. `location`: what the peer's `send` returned. `pages`: fill only these pages
        of x, the pool, if the transport is `in_place`. None: all, and x is contiguous.

        Raises RuntimeError if the link is broken, ValueError if the location is none. Then nothing will be written.
        """
        ...

    def was_read(self) -> None:
        """Complete the oldest send: the peer has read it. One-sided only. Raises ValueError if there is none."""
        ...

    def abort(self) -> None:
        """End all transfers in flight. Any thread may call it, repeatedly, but not two threads at a time.

        With NCCL, no tensor given to `recv` is written afterwards. Gloo and the one-sided libraries cannot cancel a
        receive. Its tensor or its pages then stay in use until its `wait` ends. One-sided sends end at once.
        """
        ...


class Endpoint(Protocol):
    """A process's share in a library. Its links share it, and it lives as long as the process."""

    about: str  # the library, and how it moves the bytes: for the line that each link prints

    def connect(self, store: Store, me: int) -> Transport:
        """Make one end of a link's transport: member `me` (0 or 1). The peer does the same with the same store.

        May block until the peer has come, and raises RuntimeError if it does not in time.
        """
        ...
