"""What the rounds of `peers.py` come to: medians, ratios, and whether the targets are met."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from peers_cases import CASES

Row = dict[str, Any]
"""What was measured of one candidate in one case, by variant."""


class Middle(NamedTuple):
    """The median over rounds, and the quartiles."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Middle":
        if len(values) < 2:
            return cls(*(3 * list(values)))
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3)


# -------------------------------------------------------------------------------- arithmetic


def rates(row: Row | None) -> list[float]:
    """Images per second of the better variant in each round; none where there is no row."""
    return [turn["images_per_second"] for turn in best(row)[1]["turns"]] if row else []


def best(row: Row) -> tuple[str, Row]:
    """The variant with the highest median, by name."""
    return max(
        row.items(),
        key=lambda item: statistics.median(t["images_per_second"] for t in item[1]["turns"]),
    )


def ratio(a: Row | None, b: Row | None) -> Middle | None:
    """How many times as fast a is as b, round by round."""
    pairs = list(zip(rates(a), rates(b), strict=False))
    return Middle.of([x / y for x, y in pairs]) if pairs else None


def faster_by_hand(rows: Row) -> Row | None:
    """The hand-written candidate, with or without our allocator setting."""
    found = [rows[n] for n in ("hand-written", "hand-written-allocator") if n in rows]
    return max(found, key=lambda row: statistics.median(rates(row)), default=None)


def own_deviation(row: Row) -> float:
    """How far fastvae's own figures lie from the wall clock's, at most, as a share."""
    turns = [turn for variant in row.values() for turn in variant["turns"]]
    return max(abs(t["own_images_per_second"] / t["images_per_second"] - 1) for t in turns)


class Target(NamedTuple):
    """One thing that was set out to be reached."""

    text: str
    case: str
    against: str
    least: float


TARGETS = (
    Target("2.6 times pythae", "mlp-128-float32", "pythae", 2.6),
    Target("2.6 times pythae", "mlp-512-float32", "pythae", 2.6),
    Target("3.6 times pythae (its float32)", "mlp-512-bf16", "pythae", 3.6),
    Target("1.8 times pythae (its float32)", "conv-128-bf16", "pythae", 1.8),
    Target("70 % of the matrix products alone", "mlp-512-float32", "limit", 0.7),
    *(Target("no slower than hand-written", case, "hand-written", 1.0) for case in CASES),
)


def reached(target: Target, cases: dict[str, Row]) -> Middle | None:
    """What was measured against a target; None where it was not."""
    rows = cases.get(target.case, {}).get("rows", {})
    by_hand = target.against == "hand-written"
    rival = faster_by_hand(rows) if by_hand else rows.get(target.against)
    return ratio(rows.get("fastvae"), rival)
