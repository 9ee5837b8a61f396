"""The sweep: which hierarchies are tried, and which of them become `auto`."""

from __future__ import annotations

from typing import Any

import pytest

from hispec.bench import sweep
from hispec.errors import UsageError
from hispec.hierarchy import Hierarchy, Level

TWO_LEVELS = Hierarchy((Level(2, 2), Level(4, 4)), "hispec")


def test_the_grid_has_every_sensible_hierarchy() -> None:
    found = sweep.grid([2, 4], [1, 2], [1, 2])
    assert set(found) == {"2x1", "2x2", "4x1", "4x2", "2x1-4x1", "2x1-4x2", "2x2-4x2"}
    assert sweep.default_exits(30, (4, 8)) == [4, 8]
    assert sweep.default_exits(30, ()) == [4, 8, 10, 15]
    with pytest.raises(UsageError, match="the sweep is empty"):
        sweep.grid([], [1], [1])


def test_the_best_are_measured_again_and_only_gains_become_auto() -> None:
    grid = sweep.grid([2, 4], [1, 2], [2])

    def document(**speeds: float) -> dict[str, Any]:
        entries = {name: {"speedup": 0.5, "speedup_low": 0.4} for name in grid}
        for name, speed in speeds.items():
            found = name.replace("_", "-")
            entries[found[1:]] = {"speedup": speed, "speedup_low": speed - 0.1}
        return {"methods": entries}

    again = sweep.finalists(document(l2x2=1.3, l4x1=1.2, l2x1_4x2=1.4), grid, 1)
    assert list(again) == ["2x2", "2x1-4x2"]
    chosen = sweep.best(document(l2x2=1.3, l2x1_4x2=1.05), again)
    assert chosen["auto"]["name"] == "2x2"
    assert chosen["hispec"]["levels"][0] == {"exit_layer": 2, "window": 1}
    assert sweep.best(document(l2x2=1.05), again)["auto"] == {"name": "ar", "levels": []}
    for name, value in chosen.items():
        assert Hierarchy.from_json(value, name).levels
