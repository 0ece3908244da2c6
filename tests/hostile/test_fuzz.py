"""A sample of the fuzzer's cases; thousands more by ``python -m tests.hostile.fuzz``."""

import pytest

from tests.hostile.fuzz import CASES, fuzz, prepare


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("fuzz"))


def test_what_is_altered_at_random_ends_in_a_result_or_a_line(prepared):
    """Four of each kind; the same ones every time."""
    found = fuzz(range(4 * len(CASES)), 1, prepared)
    wrong = {number: (kind, what) for number, (kind, what, _) in found.items() if what not in ("right", "line")}
    assert not wrong, "\n".join(f"{number}: {found[number][2][-2000:]}" for number in wrong)
    assert len(found) == 4 * len(CASES)
    assert {what for _, what, _ in found.values()} == {"right", "line"}
