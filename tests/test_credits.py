"""Credits for transfers in flight: never more than exist, however links take them, return them and close."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.handoff.credits import IN_FLIGHT, MOST_BYTES, Credits, Share, buffer_bytes, most_pages
from model.footprint import page_bytes
from scripts.bench.lib.shapes import SHAPES

SOON = 10
ALONE = 3  # credits that a link takes when no other has any


def free(credits: Credits) -> int:
    assert len(set(credits.free)) == len(credits.free), "two transfers would share a buffer"
    return len(credits.free)


def most(share: Share) -> int:
    """Take all that this link may have, and return how many it has."""
    while share.try_take(0) is not None:
        pass
    return share.held


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
            with pytest.raises(RuntimeError, match="closed"):
                shares[link].try_take(0)
        elif (credit := shares[link].try_take(0)) is not None:
            assert credit in range(IN_FLIGHT) and credit not in others
            held[link].append(credit)
        else:
            assert IN_FLIGHT - len(others) <= len(held[link]), "more are free than it holds"
        assert [share.held for share in shares] == [len(one) for one in held]
        assert free(credits) == IN_FLIGHT - sum(map(len, held))


@given(st.lists(st.integers(0, 5), max_size=40))
def test_a_link_has_its_first_while_any_is_free_and_stuck_ones_leave_some(takers: list[int]) -> None:
    """However those whose peers are stuck take theirs: one holds three at most, two five, and another link has one."""
    credits = Credits()
    shares = [Share(credits) for _ in range(6)]
    for taker in takers:
        left = free(credits)
        held = shares[taker].held
        assert (shares[taker].try_take(0) is not None) == (left > held)
        holders = sum(share.held > 0 for share in shares)
        assert max(share.held for share in shares) <= ALONE
        assert free(credits) >= {0: IN_FLIGHT, 1: ALONE, 2: 1}.get(holders, 0)


def test_two_stuck_links_leave_one_for_the_others_and_three_take_all() -> None:
    credits = Credits()
    assert [most(Share(credits)) for _ in range(4)] == [ALONE, 2, 1, 0]


@pytest.mark.timeout(60)
def test_a_link_waits_for_another_one_s_credit_and_looks_meanwhile() -> None:
    credits, looks = Credits(), threading.Semaphore(0)
    shares = [Share(credits) for _ in range(4)]
    for share in shares[:3]:
        most(share)
    taken = threading.Thread(target=shares[3].take, args=(looks.release, SOON), daemon=True)
    taken.start()
    assert looks.acquire(timeout=SOON) and looks.acquire(timeout=SOON) and taken.is_alive()
    shares[0].close()
    taken.join(SOON)
    assert not taken.is_alive() and free(credits) == ALONE - 1 and shares[3].held == 1


@pytest.mark.timeout(60)
def test_nobody_waits_for_a_credit_for_ever() -> None:
    credits = Credits()
    for _ in range(3):
        most(Share(credits))
    with pytest.raises(TimeoutError, match=r"no buffer has become free in 0.3 s"):
        Share(credits).take(lambda: None, 0.3)


def test_buffers_are_as_large_as_what_travels() -> None:
    v3 = page_bytes(SHAPES["v3"], 2)
    assert most_pages(v3) * v3 <= MOST_BYTES < (most_pages(v3) + 1) * v3
    assert buffer_bytes(v3) == IN_FLIGHT * most_pages(v3) * v3
    assert buffer_bytes(2 * MOST_BYTES) == IN_FLIGHT * 2 * MOST_BYTES  # one page, whatever it has
