"""The deployment as a picture shows it: its replicas with their loads, and where one request is now. For the page at /.

A request is known by the X-Request-Id that its client chose, so that the picture can show it before it has an answer.
"""

from collections import OrderedDict
from typing import Any

import msgspec

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


def picture(router: Router, model: str, prompt: Prompt | None) -> dict[str, Any]:
    """Return the state of the deployment, ready for JSON, and that of one request if it is given."""
    replicas = sorted(router.fleet.replicas.values(), key=lambda r: (r.hello.job, r.hello.members[0].rank))
    return {
        "model": model,
        "missing": [f"no {role} replica" for role in router.fleet.missing_roles()],
        "waiting": router.num_waiting,
        "replicas": [card(replica) for replica in replicas],
        "request": None if prompt is None else whereabouts(prompt),
    }


def card(replica: Replica) -> dict[str, Any]:
    """Return what the picture says of a replica. What it has not reported yet is what the router has sent."""
    hello, load = replica.hello, replica.load
    return {
        "id": replica.id,
        "role": hello.role,
        "ranks": [member.rank for member in hello.members],
        "kv_tokens": replica.capacity * PAGE,
        "kv_used": (replica.kv_pages if load is None else load.kv_pages) * PAGE,
        "queued_tokens": replica.queued_tokens,
        "step_tokens": hello.step_tokens,
        "running": len(replica.requests) if load is None else load.running,
        "max_batch": hello.max_batch,
    }


def whereabouts(prompt: Prompt) -> dict[str, Any]:
    """Return where a request is: its stage, the replicas of its latest attempt, and its time to first token in parts.

    Times are in seconds. A unified replica hands nothing over, so it has no parts.
    """
    tracked = prompt.tracked
    ttft = None if tracked.first is None else tracked.first - tracked.submitted
    parts = None if tracked.parts is None else msgspec.structs.asdict(tracked.parts)
    prefill, decode = tracked.path
    return {"state": stage(prompt), "prefill": prefill, "decode": decode, "ttft": ttft, "parts": parts}


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
