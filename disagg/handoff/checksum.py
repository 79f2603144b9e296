"""The checksum of a transfer's bytes (`--kv-checksum`), for looking for a broken wire or library."""

import zlib

import torch
from torch import Tensor

MISMATCH = "the KV arrived with other bytes than were sent (--kv-checksum)"


def checksum(x: Tensor) -> int:
    """Return the CRC-32 of a contiguous tensor's bytes. From a GPU it copies them to the host first, which is slow."""
    return zlib.crc32(x.view(torch.uint8).view(-1).cpu().numpy().data)
