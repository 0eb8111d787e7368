"""Numbers with a unit: three digits, and never an exponent, also where rounding reaches the next unit."""

import pytest

from bitnet_lit.reports.units import amount, duration, megabytes
from bitnet_lit.terminal import time_span


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (amount(0), "0"),
        (amount(7), "7"),
        (amount(999.4), "999"),
        (amount(999_499), "999 k"),
        (amount(999_936), "1 M"),  # 3,906 steps of 256 tokens
        (amount(999_948_288), "1 G"),
        (amount(1.234e12), "1,234 G"),
        (amount(None), "-"),
        (duration(0.25), "0.25 s"),
        (duration(59.94), "59.9 s"),
        (duration(59.99), "1 min"),
        (duration(3599), "1 h"),
        (duration(4e6), "1,111 h"),
        (megabytes(500), "0.5 kB"),
        (megabytes(999_999), "1 MB"),
        (megabytes(999_936_000), "1 GB"),
        (megabytes(2.5e12), "2,500 GB"),
        (time_span(99.4 * 86400), "99 days"),
        (time_span(99.7 * 86400), "100 days"),
    ],
)
def test_numbers_have_three_digits_or_more_and_no_exponent(text, expected):
    assert text == expected


def test_every_number_is_near_what_is_shown():
    sizes = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}
    for power in range(-3, 13):
        for factor in (1, 1.004, 4.995, 9.994, 9.995, 9.9951, 9.99949, 9.9995, 9.99951, 9.9999999):
            number = factor * 10.0**power
            value, _, unit = amount(number).partition(" ")
            assert "e+" not in value and float(value.replace(",", "")) * sizes[unit] == pytest.approx(number, rel=0.006)
