"""value ~ factor * size^exponent: least squares of log(value) on log(size), with its error."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Fit(NamedTuple):
    """error: the standard error of the exponent, nan of two sizes, through which a line is exact.

    factor: the fitted value at size 1.  sizes: how many were fitted.
    """

    exponent: float
    error: float
    factor: float
    sizes: int

    def at(self, size: float) -> float:
        return self.factor * size**self.exponent


def fit(sizes: Sequence[float], values: Sequence[float]) -> Fit | None:
    """None where there are fewer than two different sizes.

    ValueError where a size or a value is not positive, for it has no logarithm.
    """
    pairs = list(zip(sizes, values, strict=True))
    for size, value in pairs:
        if not (size > 0 and value > 0):
            raise ValueError(f"sizes and values must be above 0, got {value} at size {size}")
    if len(set(sizes)) < 2:
        return None
    n = len(pairs)
    xs = [math.log(size) for size, _ in pairs]
    ys = [math.log(value) for _, value in pairs]
    x, y = sum(xs) / n, sum(ys) / n
    spread = sum((a - x) ** 2 for a in xs)
    slope = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / spread
    left = sum((b - y - slope * (a - x)) ** 2 for a, b in zip(xs, ys, strict=True))
    error = math.sqrt(left / (n - 2) / spread) if n > 2 else math.nan
    return Fit(slope, error, math.exp(y - slope * x), n)
