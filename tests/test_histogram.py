"""A histogram tells percentiles within 1 %, and counts within its bounds, in memory that does not grow."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.front.histogram import LARGEST, LOW, TIMES, Histogram

SHARES = (0.0, 0.01, 0.5, 0.9, 0.99, 1.0)


def made(values: list[float]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    return histogram


def nearest_rank(values: list[float], share: float) -> float:
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


@settings(max_examples=50)
@given(st.lists(st.floats(LOW, LARGEST), min_size=1, max_size=20))
def test_percentiles_are_the_nearest_ranks_within_one_percent(values: list[float]) -> None:
    histogram = made(values)
    for share in SHARES:
        assert histogram.percentile(share) == pytest.approx(nearest_rank(values, share), rel=0.01)
    assert histogram.percentile(1) == pytest.approx(max(values), rel=1e-12), "the ends are exact"
    assert (histogram.count, histogram.sum) == (len(values), pytest.approx(sum(values)))


def test_a_value_may_be_counted_several_times_at_once() -> None:
    histogram = made([0.5])
    histogram.add(0.25, 3)
    assert vars(histogram) == vars(made([0.5, 0.25, 0.25, 0.25]))


def test_values_by_hand() -> None:
    histogram = made([0.001, 0.001, 0.002, 0.0021, 4.0])
    assert histogram.percentile(0.5) == pytest.approx(0.002, rel=1e-9)
    assert histogram.up_to((0.0009, 0.001, 0.002, 0.004, 1, 4.1)) == [0, 2, 3, 4, 4, 5]
    assert made([0.0873]).percentile(0.5) == 0.0873
    assert math.isnan(Histogram().percentile(0.5)) and Histogram().up_to(TIMES) == [0] * len(TIMES)


@settings(max_examples=50)
@given(st.lists(st.floats(0, 300) | st.sampled_from(TIMES), max_size=20))
def test_the_counts_up_to_prometheus_bounds_are_exact(values: list[float]) -> None:
    """Also of values that lie on a bound. Far below one, floats a few ulp apart may share a bucket: none here does."""
    near = [v for v in values if v in TIMES or all(abs(v / bound - 1) > 1e-9 for bound in TIMES)]
    assert made(near).up_to(TIMES) == [sum(v <= bound for v in near) for bound in TIMES]


@settings(max_examples=30)
@given(st.lists(st.floats(), max_size=20))
def test_any_float_is_taken(values: list[float]) -> None:
    """A replica says how long its parts took, and may be wrong."""
    histogram = made(values)
    assert histogram.count == len(values) == histogram.up_to([LARGEST])[0]
    assert math.isfinite(histogram.sum)
