"""The deployment as a picture shows it: its replicas with their loads, and where one request is now. For the page at /.

A request is known by the X-Request-Id that its client chose, so that the picture can show it before it has an answer.
"""

from collections import OrderedDict

import msgspec

from disagg.control.messages import Parts
from disagg.front.http.exchange import Prompt
from disagg.front.replica import Replica
from disagg.front.router import Router
from model.pages import PAGE

MOST_WATCHED = 256  # requests that are remembered, the latest
LONGEST_ID = 128  # characters


class Watched:
    """The latest requests whose clients gave them an id."""

    def __init__(self) -> None:
        self._prompts: OrderedDict[str, Prompt] = OrderedDict()

    def add(self, id: str, prompt: Prompt) -> None:
        """Remember the prompt under this id, if it has one."""
        if id and len(id) <= LONGEST_ID:
            self._prompts[id] = prompt
            self._prompts.move_to_end(id)
            if len(self._prompts) > MOST_WATCHED:
                self._prompts.popitem(last=False)

    def get(self, id: str) -> Prompt | None:
        return self._prompts.get(id)


class Card(msgspec.Struct):
    """What the picture says of a replica. What it has not reported yet is what the router has sent."""

    id: str
    role: str
    ranks: list[int]
    kv_tokens: int
    kv_used: int
    queued_tokens: int
    step_tokens: int
    running: int
    max_batch: int


class Whereabouts(msgspec.Struct):
    """Where a request is: its stage, the replicas of its latest attempt, and its time to first token in parts.

    Times are in seconds. A unified replica hands nothing over, so it has no parts.
    """

    state: str
    prefill: str
    decode: str
    ttft: float | None
    parts: Parts | None


class Picture(msgspec.Struct):
    model: str
    missing: list[str]
    waiting: int
    replicas: list[Card]
    request: Whereabouts | None


def picture(router: Router, model: str, prompt: Prompt | None) -> Picture:
    """Return the state of the deployment, and that of one request if it is given."""
    replicas = sorted(router.fleet.replicas.values(), key=lambda r: (r.hello.job, r.hello.members[0].rank))
    missing = [f"no {role} replica" for role in router.fleet.missing_roles()]
    where = None if prompt is None else whereabouts(prompt)
    return Picture(model, missing, router.num_waiting, [card(replica) for replica in replicas], where)


def card(replica: Replica) -> Card:
    hello, load = replica.hello, replica.load
    return Card(
        id=replica.id,
        role=hello.role,
        ranks=[member.rank for member in hello.members],
        kv_tokens=replica.capacity * PAGE,
        kv_used=(replica.kv_pages if load is None else load.kv_pages) * PAGE,
        queued_tokens=replica.queued_tokens,
        step_tokens=hello.step_tokens,
        running=len(replica.requests) if load is None else load.running,
        max_batch=hello.max_batch,
    )


def whereabouts(prompt: Prompt) -> Whereabouts:
    tracked = prompt.tracked
    ttft = None if tracked.first is None else tracked.first - tracked.submitted
    prefill, decode = tracked.path
    return Whereabouts(stage(prompt), prefill, decode, ttft, tracked.parts)


def stage(prompt: Prompt) -> str:
    """Return queue, prefill, transfer, decode or done.

    That a prompt is computed is known from its replica's beat, a second late at most. A short transfer is over by then.
    """
    tracked = prompt.tracked
    if prompt.answer is not None or prompt.closed:
        return "done"
    if tracked.state in ("waiting", "queued"):
        return "queue"
    if tracked.prefill is not None and tracked.prefill is not tracked.decode:
        return "transfer" if tracked.prefill.tokens_left(tracked.uid) == 0 else "prefill"
    return tracked.state
