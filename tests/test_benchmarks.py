"""What the benchmarks replace in the package is there to be replaced."""

from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def lowbit(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    import lowbit

    return lowbit


def test_every_ingredient_can_be_taken_away(lowbit: ModuleType) -> None:
    titles = [*lowbit.INGREDIENTS, *lowbit.TRAINING]
    assert len(titles) == len(set(titles)) >= 15
    for title in titles:
        with lowbit.without(title):
            pass
