"""What defences cost, in trainings of an undefended victim: the schema of `results/costs/<track>.json`.

`python -m benchmarks.defences` writes such a file. The leaderboard reads nothing but `results/`, so it
lies there, and a table that shows what no file there says is out of date.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import ClassVar, Literal

from pydantic import Field

from poisonbench.data import DataSpec
from poisonbench.records import Record
from poisonbench.stored import Config, Count, Frozen, Measured, Name
from poisonbench.victim.recipe import Recipe

FOLDER = "costs"
"""Where the files lie, below the results."""


class Round(Frozen):
    """A defended and an undefended victim, trained one right after the other.

    Attributes:
        defended, bare: processor time, in seconds.
        defended_wall, bare_wall: wall time, in seconds.
    """

    defended: float = Field(gt=0, le=1e9)
    bare: float = Field(gt=0, le=1e9)
    defended_wall: float = Field(gt=0, le=1e9)
    bare_wall: float = Field(gt=0, le=1e9)

    @property
    def ratio(self) -> float:
        """Processor time of the one over that of the other."""
        return self.defended / self.bare


class DefenseCost(Frozen):
    """What one defence costs.

    Attributes:
        defense: its name.
        config: hyperparameters by defence, as in a record.
        rounds: in order.
        multiply_adds: in the matrix products and convolutions of all compiled programs that its victim
            runs; what is done outside of them, such as a clustering, does not count.
    """

    defense: Name
    config: dict[Name, Config]
    rounds: list[Round] = Field(min_length=1)
    multiply_adds: int = Field(ge=0)

    @property
    def ratios(self) -> list[float]:
        """Round by round."""
        return [r.ratio for r in self.rounds]

    @property
    def trainings(self) -> float:
        """Median over the rounds of a defended victim's processor time over an undefended one's."""
        return median(self.ratios)


class Costs(Measured):
    """What defences cost victims of one recipe, on one track's data.

    Attributes:
        track: whose data and recipe these are.
        dataset: data, sizes and split.
        num_train: images in the training set.
        allowed: images that filters are told an attacker may poison.
        recipe_name, recipe: the victim's.
        multiply_adds: of an undefended victim.
        cores: that the process was bound to.
        defenses: one entry for each.
    """

    kind: ClassVar[str] = "file of costs"
    schema_version: Literal[1] = 1
    track: Name
    dataset: DataSpec
    num_train: Count
    allowed: Count
    recipe_name: Name
    recipe: Config
    multiply_adds: int = Field(gt=0)
    cores: int = Field(gt=0)
    defenses: list[DefenseCost]

    def counted(self, cost: DefenseCost) -> float:
        """Multiply-adds of a defended victim over those of an undefended one."""
        return cost.multiply_adds / self.multiply_adds

    def of(self, record: Record) -> DefenseCost | None:
        """What the defence of a record costs, where it was measured of such a victim."""
        victim = record.victim(self.recipe_name)
        same = (
            victim is not None
            and (record.track, record.dataset, record.num_train)
            == (self.track, self.dataset, self.num_train)
            and _text(victim.whole_recipe) == _text({**Recipe().as_dict(), **self.recipe})
        )
        if not same:
            return None
        wanted = _text(record.defense_config)
        return next((c for c in self.defenses if _text(c.config) == wanted), None)


def read(results: Path) -> list[Costs]:
    """All files of costs among the results, in order of name.

    Raises:
        UserError: one of them is not valid.
    """
    return [Costs.load(path) for path in sorted((results / FOLDER).glob("*.json"))]


def cost_of(record: Record, judge: str, several: Iterable[Costs]) -> tuple[Costs, DefenseCost] | None:
    """What the defence of a record costs victims of that recipe, and the file that says so."""
    found = ((c, c.of(record)) for c in several if c.recipe_name == judge)
    return next(((costs, cost) for costs, cost in found if cost is not None), None)


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)
