"""Credits for transfers in flight: never more than exist, however links take them, return them and close."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.handoff.credits import IN_FLIGHT, MOST_BYTES, OF_A_LINK, Credits, Share, buffer_bytes, most_pages
from model.footprint import page_bytes
from scripts.bench.lib.shapes import SHAPES

SOON = 10


def free(credits: Credits) -> int:
    """By taking them all, and putting them back."""
    taken = []
    while not credits.free.empty():
        taken.append(credits.free.get())
    for credit in taken:
        credits.free.put(credit)
    assert len(set(taken)) == len(taken), "two transfers would share a buffer"
    return len(taken)


def closed() -> None:
    raise RuntimeError("closed")


@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["take", "take", "give back", "shut", "close"])), max_size=40)
)
def test_what_links_hold_and_what_is_free_are_all_there_is(actions: list[tuple[int, str]]) -> None:
    credits = Credits()
    shares, held, gone = [Share(credits) for _ in range(3)], [[], [], []], set()
    late: list[list[int]] = [[], [], []]  # of transfers whose credits `close` gave back
    for link, action in actions:
        others = [credit for one in held for credit in one]
        if action == "shut":
            shares[link].shut()
            gone.add(link)
        elif action == "close":
            shares[link].close()
            gone.add(link)
            late[link] += held[link]
            held[link] = []
        elif action == "give back":
            if held[link]:
                shares[link].give_back(held[link].pop())
            elif late[link]:  # a transfer that was aborted ends later, and another one may have its credit by then
                shares[link].give_back(late[link].pop())
        elif link in gone:
            if len(others) < IN_FLIGHT and len(held[link]) < OF_A_LINK:
                with pytest.raises(RuntimeError, match="closed"):
                    shares[link].take(closed)
        elif len(others) < IN_FLIGHT and len(held[link]) < OF_A_LINK:  # else it would wait
            credit = shares[link].take(closed)
            assert credit in range(IN_FLIGHT) and credit not in others
            held[link].append(credit)
        assert [share.held for share in shares] == [len(one) for one in held]
        assert free(credits) == IN_FLIGHT - sum(map(len, held))


def test_one_link_leaves_something_for_the_others() -> None:
    credits = Credits()
    first, second = Share(credits), Share(credits)
    for _ in range(OF_A_LINK):
        first.take(closed)
    with pytest.raises(RuntimeError):
        first.take(closed)
    second.take(closed)
    assert free(credits) == IN_FLIGHT - OF_A_LINK - 1


@pytest.mark.timeout(60)
def test_a_link_waits_for_another_one_s_credit_and_looks_meanwhile() -> None:
    credits, looks = Credits(), threading.Semaphore(0)
    first, second, third = Share(credits), Share(credits), Share(credits)
    for _ in range(OF_A_LINK):
        first.take(closed)
    for _ in range(IN_FLIGHT - OF_A_LINK):
        second.take(closed)
    taken = threading.Thread(target=third.take, args=(looks.release,), daemon=True)
    taken.start()
    assert looks.acquire(timeout=SOON) and looks.acquire(timeout=SOON) and taken.is_alive()
    first.close()
    taken.join(SOON)
    assert not taken.is_alive() and free(credits) == OF_A_LINK - 1


def test_buffers_are_as_large_as_what_travels() -> None:
    v3 = page_bytes(SHAPES["v3"], 2)
    assert most_pages(v3) * v3 <= MOST_BYTES < (most_pages(v3) + 1) * v3
    assert buffer_bytes(v3) == IN_FLIGHT * most_pages(v3) * v3
    assert buffer_bytes(2 * MOST_BYTES) == IN_FLIGHT * 2 * MOST_BYTES  # one page, whatever it has
