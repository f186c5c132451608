"""What `benchmarks/load.py` calls wrong."""

from collections import Counter

import pytest
from load import differences, grows

SENT = Counter(
    whole=10, stream=5, left=4, refused=3, prompt_tokens=700, tokens=150, left_at_least=20,
    left_at_most=400,
)  # fmt: skip
# One of those that left had its answer already.
COUNTED = Counter(
    {
        "status 200": 16, "status 400": 3, "status disconnected": 3, "refused: asks_too_much": 3,
        "refused: full": 0, "prompt_tokens": 700, "generation_tokens": 200,
    }
)  # fmt: skip


def test_what_adds_up_is_not_told() -> None:
    assert differences(SENT, COUNTED) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("status 200", 15),
        ("status 500", 1),
        ("status disconnected", 5),
        ("refused: asks_too_much", 2),
        ("refused: full", 1),
        ("prompt_tokens", 701),
        ("generation_tokens", 169),
        ("generation_tokens", 551),
    ],
)
def test_what_is_counted_otherwise_is_told(name: str, value: int) -> None:
    assert any(name in found for found in differences(SENT, Counter(COUNTED | {name: value})))


def test_a_request_that_failed_is_told() -> None:
    failed = Counter({"failed: whole: gone": 2})
    assert differences(SENT + failed, COUNTED) == ["2 × failed: whole: gone"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([800, 842, 842, 842, 842], False),
        ([2685, 3206, 3217, 3241, 3246], False),
        ([3500, 4000, 4030, 4045, 4053], False),
        ([800, 840, 850, 860, 870], True),
        ([800, 840, 840, 840, 860], True),
    ],
)
def test_what_does_not_level_is_told(values: list[float], expected: bool) -> None:
    assert grows(values, 4) is expected
