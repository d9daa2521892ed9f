"""What a run leaves behind: one JSON file that proves itself.

Records are append-only. A wrong one is marked by `status`, with the reason, and never deleted.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from poisonbench.data import DataSpec
from poisonbench.errors import UserError
from poisonbench.statistics import Interval, mean_interval, paired_drop
from poisonbench.stored import (
    DEFENSE,
    Brief,
    Config,
    Count,
    Frozen,
    Hash,
    Long,
    Measured,
    Name,
    Percent,
    Seconds,
    Seed,
)  # fmt: skip
from poisonbench.threat import Budget, PoisonSet
from poisonbench.victim.recipe import Recipe

SCHEMA_VERSION: Literal[1] = 1


class Filtering(Frozen):
    """What a defence dropped, seed by seed.

    Attributes:
        clean_run: images dropped of the clean set.
        poisoned_run: images dropped of the poisoned set.
        poison: how many of the latter were poison.
    """

    clean_run: list[Count]
    poisoned_run: list[Count]
    poison: list[Count]


class Certificate(Frozen):
    """What a certified defence promised, and whether it held.

    Attributes:
        curve: share of test images, in percent, that clean victims get right and certify against so many
            additions and removals: against none first, then against one, and so on.
        changes: additions and removals that this poison is.
        violations: test images, over all seeds, that were certified against as many and went wrong.
    """

    curve: list[Percent] = Field(min_length=1)
    changes: Count
    violations: Count

    @property
    def promised(self) -> float:
        """Accuracy certified to stay under as many changes as the poison makes, in percent."""
        return self.curve[self.changes] if self.changes < len(self.curve) else 0.0


class VictimScores(Frozen):
    """Every seed's accuracy on one recipe, in percent, clean and poisoned in pairs.

    Attributes:
        recipe_name: `smooth`, `standard`, or whatever the run called it.
        recipe: every number of it.
        seeds: which evaluation seeds; the lists below follow their order.
        clean, poisoned: final test accuracy.
        clean_best, poisoned_best: test accuracy after the best epoch.
        filtering: what a defence that weighs images dropped.
        certificate: what a certified defence promised.
    """

    recipe_name: Name
    recipe: Config
    seeds: list[Seed] = Field(min_length=2)
    clean: list[Percent]
    poisoned: list[Percent]
    clean_best: list[Percent]
    poisoned_best: list[Percent]
    filtering: Filtering | None = None
    certificate: Certificate | None = None

    @model_validator(mode="after")
    def _paired(self) -> VictimScores:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("a seed is repeated, which would narrow the interval")
        for scores in (self.clean, self.poisoned, self.clean_best, self.poisoned_best):
            if len(scores) != len(self.seeds):
                raise ValueError("every seed needs one accuracy in each list")
        if self.filtering is not None:
            for counts in (self.filtering.clean_run, self.filtering.poisoned_run, self.filtering.poison):
                if len(counts) != len(self.seeds):
                    raise ValueError("every seed needs one count of what was dropped")
        return self

    @property
    def whole_recipe(self) -> dict[str, Any]:
        """The recipe, with fields that it did not have when this was measured at their defaults."""
        return {**_default_recipe(), **self.recipe}

    @property
    def drops(self) -> list[float]:
        """Accuracy lost after the last epoch, in points, seed by seed."""
        return [clean - poisoned for clean, poisoned in zip(self.clean, self.poisoned, strict=True)]

    @property
    def drop(self) -> Interval:
        """Accuracy lost after the last epoch, in points."""
        return paired_drop(self.clean, self.poisoned)

    @property
    def best_drop(self) -> Interval:
        """Accuracy lost between the best epochs, in points."""
        return paired_drop(self.clean_best, self.poisoned_best)

    @property
    def clean_accuracy(self) -> Interval:
        """Final accuracy of clean victims, in percent."""
        return mean_interval(self.clean)

    @property
    def poisoned_accuracy(self) -> Interval:
        """Final accuracy of poisoned victims, in percent."""
        return mean_interval(self.poisoned)


class Record(Measured):
    """One attack under one defence, measured.

    Attributes:
        track: the preset that it ran under.
        custom: what was overridden in the preset, if anything; such records are never ranked
            with the preset's own.
        attack, attack_config, attack_seed: what crafted the poison, whole.
        defense: what the victims were defended by; several with `+` between them, in their order.
        defense_config: the hyperparameters of each, whole, by its name.
        dataset, hashes: the data, and the content hash of each split.
        budget, num_train, num_poison: what could be changed, and how much was.
        surrogate: the recipe that the attack was crafted against, by name.
        victims: scores, recipe by recipe.
        poison_hash: content hash of the poison file.
        crafting_seconds, evaluation_seconds: wall time on `hardware`; of a poison that was there before,
            crafting on the machine that made it. None where it was handed in.
        status: `valid`; or `invalid`, or `superseded` by a later run of the same, with the reason in
            `remark`.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    track: Name
    custom: list[Brief] = Field(default=[], max_length=1000)
    attack: Name
    attack_config: Config
    attack_seed: Seed
    defense: Annotated[str, Field(pattern=DEFENSE)] = "none"
    defense_config: Config = Field(default={})
    dataset: DataSpec
    hashes: dict[Literal["train", "val", "test"], Hash] = Field(min_length=3)
    budget: Budget
    num_train: Annotated[Count, Field(ge=1)]
    num_poison: Count
    surrogate: Name
    victims: list[VictimScores] = Field(min_length=1)
    poison_hash: Hash
    crafting_seconds: Seconds | None
    evaluation_seconds: Seconds
    status: Literal["valid", "invalid", "superseded"] = "valid"
    remark: Long = ""

    @model_validator(mode="after")
    def _consistent(self) -> Record:
        names = [victim.recipe_name for victim in self.victims]
        if len(set(names)) != len(names):
            raise ValueError("a recipe is scored twice")
        if self.surrogate not in names:
            raise ValueError(f"no scores on the surrogate recipe {self.surrogate}")
        if self.num_poison > self.budget.count(self.num_train):
            raise ValueError("more images are poisoned than the budget allows")
        if self.status != "valid" and not self.remark:
            raise ValueError(f"a record marked {self.status} needs a remark that says why")
        return self

    def victim(self, name: str) -> VictimScores | None:
        """The scores on the recipe of that name, if it was measured."""
        return next((v for v in self.victims if v.recipe_name == name), None)

    def require(self, poison: PoisonSet, folder: Path) -> None:
        """Make sure that a folder's poison is the one that was scored.

        Raises:
            UserError: it is another.
        """
        if poison.hash != self.poison_hash:
            raise UserError(f"{folder} holds another poison than its record scored: run it again")


@cache
def _default_recipe() -> dict[str, Any]:
    return Recipe().as_dict()


def find(folder: Path) -> list[tuple[Path, Record]]:
    """Every record below a folder, in order of path; hidden folders are work in progress.

    Raises:
        UserError: one of them is not valid.
    """
    paths = sorted(folder.rglob("record.json"))
    shown = [p for p in paths if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    return [(path, Record.load(path)) for path in shown]
