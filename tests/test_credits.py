"""Credits for transfers under way: no more than there are, however links take, return and close."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.credits import IN_FLIGHT, MOST_BYTES, Credits, Share, buffer_bytes, most_pages
from disagg.memory import page_bytes
from scripts.shapes import SHAPES

SOON = 10


def free(credits: Credits) -> int:
    """By taking them all, and putting them back."""
    count = 0
    while credits.free.acquire(blocking=False):
        count += 1
    for _ in range(count):
        credits.free.release()
    return count


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["take", "give back", "close"])), max_size=40))
def test_what_links_hold_and_what_is_free_are_all_there_is(actions: list[tuple[int, str]]) -> None:
    credits = Credits()
    shares, held, closed = [Share(credits) for _ in range(3)], [0, 0, 0], set()
    for link, action in actions:
        if action == "close":
            shares[link].close()
            closed.add(link)
            held[link] = 0
        elif action == "give back":
            if held[link] or link in closed:  # a transfer that was aborted ends later
                shares[link].give_back()
                held[link] = max(0, held[link] - 1)
        elif sum(held) < IN_FLIGHT:  # else it would wait
            if link in closed:
                with pytest.raises(RuntimeError, match="closed"):
                    shares[link].take()
            else:
                shares[link].take()
                held[link] += 1
        assert free(credits) == IN_FLIGHT - sum(held)


@pytest.mark.timeout(60)
def test_a_link_waits_for_another_one_s_credit_and_gets_it_when_that_closes() -> None:
    credits = Credits()
    first, second, third = Share(credits), Share(credits), Share(credits)
    for _ in range(IN_FLIGHT):
        first.take()
    outcome: list[str] = []

    def take(share: Share, name: str) -> None:
        try:
            share.take()
            outcome.append(name)
        except RuntimeError as error:
            outcome.append(f"{name}: {error}")

    waiting = [threading.Thread(target=take, args=pair, daemon=True) for pair in ((second, "second"), (third, "third"))]
    for thread in waiting:
        thread.start()
    third.close()  # while it waits
    waiting[0].join(0.1)
    assert not outcome and all(thread.is_alive() for thread in waiting)
    first.close()
    for thread in waiting:
        thread.join(SOON)
    assert sorted(outcome) == ["second", "third: closed"] and free(credits) == IN_FLIGHT - 1


def test_buffers_are_as_large_as_what_travels() -> None:
    v3 = page_bytes(SHAPES["v3"], 2)
    assert most_pages(v3) * v3 <= MOST_BYTES < (most_pages(v3) + 1) * v3
    assert buffer_bytes(v3) == IN_FLIGHT * most_pages(v3) * v3
    assert buffer_bytes(2 * MOST_BYTES) == IN_FLIGHT * 2 * MOST_BYTES  # one page, whatever it has
