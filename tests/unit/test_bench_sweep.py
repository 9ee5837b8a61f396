"""The sweep: which hierarchies are tried, and which of them become `auto`."""

from __future__ import annotations

from typing import Any

import pytest

from hispec.bench import sweep
from hispec.commands.bench_sweep import whole_numbers
from hispec.errors import UsageError
from hispec.hierarchy import Hierarchy, Level

TWO_LEVELS = Hierarchy((Level(2, 2), Level(4, 4)), "hispec")


def test_the_grid_has_every_sensible_hierarchy() -> None:
    found = sweep.grid([2, 4], [1, 2], [1, 2])
    singles = {"2x1", "2x2", "4x1", "4x2"}
    assert set(found) == {
        *(singles | {name + "r" for name in singles}),
        *("2x1-4x1", "2x1-4x2", "2x2-4x2"),
    }
    assert found["4x2r"].levels == (Level(4, 2, ranks=True),)
    assert sweep.kind(found["4x2r"]) == "layerskip"
    assert sweep.default_exits(30, (4, 8)) == [4, 8]
    assert sweep.default_exits(30, ()) == [4, 8, 10, 15]
    with pytest.raises(UsageError, match="the sweep is empty"):
        sweep.grid([], [1], [1])


def test_exit_0_may_be_tried_but_no_window_of_0() -> None:
    assert whole_numbers("--exit-layers", "8,0", 0) == [0, 8]
    with pytest.raises(UsageError, match="--windows should be numbers of at least 1, got '0,1'"):
        whole_numbers("--windows", "0,1")
    with pytest.raises(UsageError, match="--exit-layers should be numbers of at least 0"):
        whole_numbers("--exit-layers", "-1,2", 0)


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
