"""Student's t against the printed tables, intervals against a computation by hand, interpolation."""

import math

import numpy as np
import pytest

from bitnet_lit.reports.statistics import Estimate, interpolate, quantile_975, within


@pytest.mark.parametrize(
    ("degrees", "printed"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (29, 2.045), (100, 1.984)],
)
def test_quantiles_are_those_of_the_tables(degrees, printed):
    assert quantile_975(degrees) == pytest.approx(printed, abs=5e-4)  # the tables have three digits


def test_the_distribution_of_one_degree_is_cauchys():
    assert within(1.0, 1) == pytest.approx(0.5, abs=1e-15)
    assert within(math.sqrt(2), 2) == pytest.approx(math.sqrt(0.5), abs=1e-15)  # t / sqrt(2 + t^2)


def test_an_interval_by_hand():
    estimate = Estimate.of([1.0, 2.0, 4.0])
    deviation = math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2)
    assert estimate.mean == pytest.approx(7 / 3)
    assert estimate.half_width == pytest.approx(4.3027 * deviation / math.sqrt(3), rel=1e-4)
    assert Estimate.of([2.0]) == Estimate(2.0, None, 1)


def test_no_value_outside_of_a_curve():
    xs, ys = np.array([1.0, 3.0]), np.array([10.0, 20.0])
    assert [interpolate(x, xs, ys) for x in (0.9, 1.0, 2.5, 3.0, 3.1)] == [None, 10.0, 17.5, 20.0, None]
    assert interpolate(1.0, np.array([]), np.array([])) is None
