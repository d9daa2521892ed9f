"""What a measurement of smoothness leaves behind: one JSON file with every single value.

Values that are not finite are stored as `null`: a recipe whose metagradient is NaN is a finding.
Means and intervals are derived from the values when they are asked for, never stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from poisonbench.data import DataSpec
from poisonbench.smoothness.intervals import crossed_interval, pairs_interval
from poisonbench.smoothness.probe import Probe
from poisonbench.statistics import Interval, mean_interval
from poisonbench.stored import Config, Frozen, Hash, Measured, Name, Percent, Seconds
from poisonbench.threat import Budget

FILE = "smoothness.json"
Number = float | None


def numbers(values: np.ndarray) -> list[Any]:
    """An array as it is stored, nested like it."""
    if values.ndim > 1:
        return [numbers(row) for row in values]
    return [value if math.isfinite(value) else None for value in values.tolist()]


def array(values: Sequence[Any]) -> np.ndarray:
    """The inverse of `numbers`, in float64, with NaN for what was not finite."""
    return np.array(values, np.float64)


class Gain(Frozen):
    """Sign steps of one size, one for each seed's own metagradient.

    Attributes:
        step_size: in pixel units.
        predicted: `[seeds]`, what each metagradient promises.
        realised: `[seeds][seeds]`, what the step of the first seed does to the second's loss.
    """

    step_size: float = Field(gt=0)
    predicted: list[Number]
    realised: list[list[Number]]

    @property
    def promised(self) -> Interval | None:
        """Mean of the prediction; None where a value is not finite."""
        return _over_seeds(self.predicted)

    @property
    def same_seed(self) -> Interval | None:
        """Mean gain on the seed that the step was made for."""
        return _over_seeds([row[i] for i, row in enumerate(self.realised)])

    @property
    def other_seeds(self) -> Interval | None:
        """Mean gain on the seeds that it was not made for."""
        return _off_diagonal(self.realised)


class Steps(Frozen):
    """What metagradients are worth to an attack.

    Attributes:
        images: which training images they are of.
        ranked_by: how many seeds' metagradients chose those; 0 where they were drawn.
        norms: `[seeds]`, Euclidean length of each seed's metagradient.
        cosines: `[seeds][seeds]`, between seeds.
        gains: by step size, rising.
    """

    images: list[int]
    ranked_by: int
    norms: list[Number]
    cosines: list[list[Number]]
    gains: list[Gain]

    @property
    def broken(self) -> int:
        """Seeds whose metagradient is not finite."""
        return self.norms.count(None)

    @property
    def agreement(self) -> Interval | None:
        """Mean cosine of two seeds' metagradients; None where one has no direction."""
        return _off_diagonal(self.cosines)

    @property
    def largest(self) -> float | None:
        """The largest step size whose gain on other seeds has its whole interval above 0."""
        return max(self._gaining, default=None)

    @property
    def best(self) -> float | None:
        """Of those step sizes the one whose gain on other seeds is largest."""
        return max(self._gaining, key=self._gaining.__getitem__, default=None)

    @property
    def _gaining(self) -> dict[float, float]:
        """Step sizes that gain on other seeds, and how much."""
        return {
            g.step_size: g.other_seeds.mean
            for g in self.gains
            if g.other_seeds and g.other_seeds.low > 0
        }


class Survey(Frozen):
    """One recipe, measured.

    Attributes:
        label: its name, or what was changed in the base recipe.
        recipe: every number of it.
        accuracy: `[seeds]`, of clean victims on validation data, in percent.
        loss: `[seeds]`, their validation loss.
        definition1, definition2: `[seeds][directions]`.
        steps: agreement and gains, where they were asked for.
        seconds: wall time that the measuring took, whenever that was.
    """

    label: str
    recipe: Config
    accuracy: list[Percent] = Field(min_length=3)
    loss: list[Number]
    definition1: list[list[Number]]
    definition2: list[list[Number]]
    steps: Steps | None = None
    seconds: Seconds

    @property
    def mean_accuracy(self) -> Interval:
        """Over the seeds."""
        return mean_interval(self.accuracy)

    @property
    def curvature(self) -> Interval | None:
        """Definition 1, over seeds and directions; None where a loss is not finite."""
        return _over_both(self.definition1)

    @property
    def smoothness(self) -> Interval | None:
        """Definition 2, over seeds and directions; None where a parameter is not finite."""
        return _over_both(self.definition2)


class Landscape(Frozen):
    """The loss over a square of perturbations, of one seed.

    Attributes:
        label: the recipe's name.
        at: `[points]`, distance along either direction, in pixel units.
        loss: `[points][points]`, rows along the first direction.
        seconds: wall time.
    """

    label: str
    at: list[float]
    loss: list[list[Number]]
    seconds: Seconds


class SmoothnessRecord(Measured):
    """All that was measured in one call, and what it was measured with.

    Attributes:
        track, custom: the preset, and what was overridden in it.
        dataset, hashes: the data, and the content hash of the splits that were used.
        budget: how many images move, and within which pixels.
        probe: the questions.
        base: name of the recipe that the grid changes.
        recipes, grid, landscapes: the answers.
        seconds: wall time of all measurements, on `hardware`.
        status: `valid`, or `invalid` with the reason in `remark`.
    """

    schema_version: Literal[1] = 1
    track: Name
    custom: list[str]
    dataset: DataSpec
    hashes: dict[Literal["train", "val"], Hash] = Field(min_length=2)
    budget: Budget
    num_train: int = Field(ge=1)
    num_moved: int = Field(ge=1)
    probe: Probe
    base: str
    recipes: list[Survey] = Field(min_length=1)
    grid: list[Survey]
    landscapes: list[Landscape]
    seconds: Seconds
    status: Literal["valid", "invalid"] = "valid"
    remark: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> SmoothnessRecord:
        seeds, directions = self.probe.seeds, self.probe.directions
        for survey in (*self.recipes, *self.grid):
            if len(survey.accuracy) != seeds or len(survey.loss) != seeds:
                raise ValueError(f"{survey.label}: one accuracy and one loss for each seed")
            for table in (survey.definition1, survey.definition2):
                if [len(row) for row in table] != [directions] * seeds:
                    raise ValueError(f"{survey.label}: one value for each seed and direction")
        if self.status == "invalid" and not self.remark:
            raise ValueError("an invalid record needs a remark that says why")
        return self


def unfinite(values: Sequence[Any]) -> str:
    """How many of nested values are not finite, in words."""
    flat = array(values).ravel()
    return f"not finite ({int((~np.isfinite(flat)).sum())} of {flat.size})"


def _over_seeds(values: Sequence[Number]) -> Interval | None:
    finite = [value for value in values if value is not None]
    return mean_interval(finite) if len(finite) == len(values) else None


def _over_both(values: Sequence[Sequence[Number]]) -> Interval | None:
    table = array(values)
    return crossed_interval(table) if np.isfinite(table).all() else None


def _off_diagonal(values: Sequence[Sequence[Number]]) -> Interval | None:
    table = array(values)
    np.fill_diagonal(table, 0.0)  # what stands there is not looked at
    return pairs_interval(table) if np.isfinite(table).all() else None
