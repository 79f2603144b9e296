"""DraftPolicy: how many drafts each step has, learned from the steps so far (`--speculate auto`).

With n drafts a step gives E(n) tokens to a sequence, and takes t(n) seconds. The policy takes the n for which
E(n) / t(n) is largest. It learns

- from the drafts that were right: E(n) = 1 + a(1) + a(1) a(2) + .., with a(i) the share of the i-th drafts that are
  right after right ones. Recent ones weigh most. A draft that is not made is not judged.
- from steps in a row that differ in n only: how t(n) compares with t(best n so far), for each bucket. It needs no
  absolute times, which grow with the texts. A median of both sides leaves out single stalls.

Who never tries another n learns nothing of it. So for PROBE steps in a row it makes n drafts, a probe. The wait for the
next probe is as long as makes the time lost by them SHARE of all: what costs much is tried seldom.
"""

import math
from collections import deque
from statistics import median

PROBE = 4  # steps that make n drafts; the first of them still verifies others
SHARE = 0.01  # of the time: the most that probes lose
GAP = 40  # the fewest steps from one probe of n to the next
BETTER = 1.02  # another n must be so much better than the one in use
TRUST = 0.96  # by which the rate of drafts is multiplied, because all that is learned errs, and none never loses
RECENT = 15  # steps whose median is a probe's other side

MEMORY = 100  # drafts in one place that are remembered, or those of MEMORY_STEPS steps if they are more
MEMORY_STEPS = 16
GUESSED_RIGHT, GUESSED_DRAFTS = 0.7, 4.0  # before any draft was judged: this share, as if so many had been
GUESSED_TIME = 0.2  # before any step: a draft lengthens a step by so much of it

UNKNOWN = 0.25  # variance of log t(n) before it is measured
LEAST_NOISE = 1e-4  # variance of a probe's result
DRIFT = 4e-4  # by which the variance grows from probe to probe, because t(n) may change


class Chances:
    """a(i) for places i = 1 .. N."""

    def __init__(self, most: int) -> None:
        self._tried, self._right = [0.0] * most, [0.0] * most

    def add(self, place: int, tried: int, right: int) -> None:
        """Count a step's drafts in a place: `tried` of them came after right ones only, and `right` were right."""
        kept = max(1 - tried / MEMORY, 1 - 1 / MEMORY_STEPS)
        self._tried[place - 1] = self._tried[place - 1] * kept + tried
        self._right[place - 1] = self._right[place - 1] * kept + right

    def tokens(self) -> list[float]:
        """Return E(0) .. E(N). A place about which little is known is taken to be like the one before it."""
        found, before, product = [1.0], GUESSED_RIGHT, 1.0
        for tried, right in zip(self._tried, self._right, strict=True):
            before = (right + before * GUESSED_DRAFTS) / (tried + GUESSED_DRAFTS)
            product *= before
            found.append(found[-1] + product)
        return found


class StepTimes:
    """How the steps of one bucket compare in time, by n. `best` is in use; the others are known by probes."""

    def __init__(self, most: int, like: "StepTimes | None" = None) -> None:
        """`like`: of another bucket, from which this one's may not differ much."""
        self.log = list(like.log) if like else [math.log1p(GUESSED_TIME * n) for n in range(most + 1)]
        self.best = like.best if like else 0
        self.variance = [UNKNOWN] * (most + 1)
        self.variance[self.best] = 0.0
        self.known = {self.best}
        self.recent: deque[float] = deque(maxlen=RECENT)  # seconds of steps with `best`
        self.clock = 0.0  # seconds of all steps
        self.probed = [0.0] * (most + 1)  # the clock after the latest probe
        self.quiet = 0.0  # without drafts, nothing is to be decided before the clock says so

    def ratio(self, n: int) -> float:
        """Return t(n) / t(best)."""
        return math.exp(self.log[n] - self.log[self.best])

    def compare(self, n: int, seconds: list[float]) -> None:
        """Take the times of a probe's steps."""
        logs, others = [math.log(s) for s in seconds], [math.log(s) for s in self.recent]
        middle = median(others)
        spread = median(abs(x - middle) for x in others) * 1.48  # the standard deviation, if they were normal
        noise = LEAST_NOISE + spread**2 * (1 / len(logs) + 1 / len(others)) * 1.57
        mine, base = self.variance[n] + DRIFT, self.variance[self.best] + DRIFT
        total = mine + base + noise
        error = median(logs) - middle - (self.log[n] - self.log[self.best])
        if n not in self.known:  # what is further from `best`, and not known either, goes along
            beyond = range(n + 1, len(self.log)) if n > self.best else range(n)
            for other in set(beyond) - self.known:
                self.log[other] += error
            self.known.add(n)
        limit = 3 * math.sqrt(total)
        taken = max(-limit, min(limit, error))
        self.log[n] += taken * mine / total
        self.log[self.best] -= taken * base / total
        self.variance[self.best] = base * (1 - base / total)
        # Over the limit it was an accident, or a change. The next probe tells, as it weighs more.
        self.variance[n] = mine * (1 - mine / total) if taken == error else error**2 / 4


class DraftPolicy:
    """Chooses for the steps of a job. It sees a step one or two turns after it was chosen."""

    def __init__(self, most: int) -> None:
        """`most`: N. Steps make 0 to N drafts."""
        self.most = most
        self._chances = Chances(most)
        self._times: dict[int, StepTimes] = {}  # by bucket
        self._mixed: deque[float] = deque(maxlen=RECENT)  # seconds per token of steps with prompt tokens
        self._probe: tuple[int, int] | None = None  # bucket and n
        self._left = 0  # steps of the probe that are not chosen yet
        self._seen: list[float] = []  # seconds of the probe's steps
        self._counts = [0] * (2 * most)

    def choose(self, bucket: int, mixed: bool = False) -> int:
        """Return how many drafts the next step makes, for the one after it to verify.

        `bucket`: the rows of decoding sequences, as far as they are known. `mixed`: do steps have prompt tokens now?
        """
        times = self._of(bucket)
        if self._probe is not None and (mixed or self._probe[0] != bucket):
            self._end_probe()
        if mixed:
            return self._beside_prompts(bucket, times)
        if self._probe is None and times.best == 0 and times.clock < times.quiet:
            return 0
        if self._probe is None:
            self._settle(times)
            n = self._due(times)
            if n is None:
                return times.best
            self._probe, self._left, self._seen = (bucket, n), PROBE, []
        if self._left == 0:
            return times.best
        self._left -= 1
        return self._probe[1]

    def count_step(self, bucket: int, verified: int, made: int, seconds: float) -> None:
        """Take the time of a step without prompt tokens."""
        times = self._of(bucket)
        times.clock += seconds
        if verified != made:  # partly like the one, partly like the other
            return
        if self._probe == (bucket, made):
            self._seen.append(seconds)
        elif made == times.best:
            times.recent.append(seconds)
        if self._probe is not None and (len(self._seen) == PROBE - 1 or (self._left == 0 and made == times.best)):
            self._end_probe()

    def count_mixed(self, tokens: int, seconds: float) -> None:
        """Take the time of a step with prompt tokens, in which the fullest replica computed `tokens`."""
        self._mixed.append(seconds / tokens)

    def count_drafts(self, counts: list[int]) -> None:
        """Take how many drafts of all steps so far came after right ones only, by place, and how many were right."""
        if counts == self._counts:
            return
        new = [count - before for count, before in zip(counts, self._counts, strict=True)]
        self._counts = counts
        for place, (tried, right) in enumerate(zip(new[: self.most], new[self.most :], strict=True), 1):
            self._chances.add(place, tried, right)

    def _of(self, bucket: int) -> StepTimes:
        if bucket not in self._times:
            near = min(self._times, key=lambda other: abs(math.log(other / bucket)), default=None)
            self._times[bucket] = StepTimes(self.most, self._times[near] if near is not None else None)
        return self._times[bucket]

    def _rates(self, times: StepTimes) -> list[float]:
        """Return E(n) / t(n), in any unit, with drafts a little less."""
        none, *drafts = (e / math.exp(log) for e, log in zip(self._chances.tokens(), times.log, strict=True))
        return [none, *(TRUST * rate for rate in drafts)]

    def _settle(self, times: StepTimes) -> None:
        """Use another n if it has turned out better."""
        rates = self._rates(times)
        best = max(times.known, key=rates.__getitem__)
        if rates[best] > BETTER * rates[times.best]:
            times.best = best
            times.recent.clear()

    def _due(self, times: StepTimes) -> int | None:
        """Return the n to probe now, if any: one next to the best that is not known, or one that has waited enough."""
        if len(times.recent) < PROBE:
            return None
        for n in (0, times.best + 1, times.best - 1):
            if 0 <= n <= self.most and n not in times.known:
                return n
        rates, step, over = self._rates(times), median(times.recent), {}
        for n in set(range(self.most + 1)) - {times.best}:
            lost = PROBE * step * times.ratio(n) * max(0.0, 1 - rates[n] / rates[times.best])
            over[n] = times.clock - times.probed[n] - max(lost * self.most / SHARE, GAP * step)
        n = max(over, key=over.__getitem__)
        times.quiet = times.clock + min(-over[n], GAP * step)
        return n if over[n] >= 0 else None

    def _end_probe(self) -> None:
        assert self._probe is not None
        bucket, n = self._probe
        times = self._times[bucket]
        times.probed[n], times.quiet = times.clock, 0.0
        if self._seen and times.recent:
            times.compare(n, self._seen)
        self._probe = None

    def _beside_prompts(self, rows: int, times: StepTimes) -> int:
        """Return how many drafts pay in a step with prompt tokens, whose time depends on these above all.

        A token that is right saves its part of a decode step. Each draft costs what a token of such a step costs, and
        at most what it costs in a decode step. What was never measured pays nothing.
        """
        if not self._mixed or not times.recent:
            return 0
        tokens, step, each = self._chances.tokens(), median(times.recent), rows * median(self._mixed)

        def pays(n: int) -> float:
            return (tokens[n] - 1) * step / tokens[times.best] - n * each - step * (times.ratio(n) - times.ratio(0))

        return max(range(times.best + 1), key=pays)
