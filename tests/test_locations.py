"""Locations: where a one-sided transport's decode end finds the pages that it reads."""

import ctypes
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from disagg.handoff.transports.one_sided import PAGES, WHERE, OneSided, Run, Staging, parse_location


class Sender(OneSided):
    """An end that only sends."""

    def greet(self) -> None: ...

    def _read(self, x: Tensor, runs: list[Run], device: int) -> Any:
        raise AssertionError


@given(st.data())
@settings(deadline=None, derandomize=True, max_examples=100)
def test_a_location_finds_the_pages_in_as_few_runs_as_there_are(data: st.DataObject) -> None:
    """The reading is done here, by this process from its own memory."""
    layers, num_pages = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    pool = torch.randint(256, (layers, num_pages, 5, 3), dtype=torch.uint8)
    pages = data.draw(st.none() | st.lists(st.integers(0, num_pages - 1), min_size=1, max_size=12))
    transfer, location = Sender(Staging(torch.empty(1, 1, 1))).send(pool, pages)
    wanted = pool if pages is None else pool[:, pages]
    assert transfer.nbytes == wanted.nbytes
    count = wanted.shape[1]
    mine = data.draw(st.none() | st.permutations(range(15)).map(lambda order: order[:count]))
    read = torch.full((layers, count if mine is None else 15, 5, 3), 7, dtype=torch.uint8)
    runs, device = parse_location(location, read, mine)
    for here, there, size in runs:
        ctypes.memmove(here, there, size)
    expected = torch.full_like(read, 7)
    expected[:, range(count) if mine is None else mine] = wanted
    assert read.equal(expected) and device == 0
    if pages is None and mine is None:
        assert len(runs) == 1
    else:
        places = zip(pages or range(count), mine or range(count), strict=True)
        breaks = sum(b != (a[0] + 1, a[1] + 1) for a, b in pairwise(places))
        assert len(runs) == layers * (1 + breaks) or len(runs) == 1


@pytest.mark.parametrize(
    "location, said",
    [
        (b"", "of 0 bytes, which is none"),
        (WHERE.pack(0, 0, 64) + PAGES.pack(0, 2)[:-1], "of 27 bytes, which is none"),
        (WHERE.pack(0, 0, 64), "of 0 pages, and not of 2"),
        (WHERE.pack(0, 0, 64) + PAGES.pack(0, 3), "of 3 pages, and not of 2"),
        (WHERE.pack(0, 0, 64) + PAGES.pack(0, 2) + PAGES.pack(7, 0), "of 2 pages, one run of none"),
        (WHERE.pack(0, 0, 64) + 3 * PAGES.pack(0, 1), "of 44 bytes, too many for 2 pages"),
        (WHERE.pack(2**64 - 1, 0, 64) + PAGES.pack(0, 2), "behind the last address"),
        (WHERE.pack(0, 0, 2**64 - 1) + PAGES.pack(0, 2), "behind the last address"),
        (WHERE.pack(2**64 - 900, 0, 0) + PAGES.pack(2**32 - 1, 1) + PAGES.pack(0, 1), "behind the last address"),
    ],
)
def test_a_location_that_is_none_is_refused_before_anything_is_read(location: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=f"the other end sent a location {said}"):
        parse_location(location, torch.empty(3, 2, 64, dtype=torch.uint8))
