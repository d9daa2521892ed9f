"""What is asked of a recipe: every number that decides a measurement of smoothness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from poisonbench.errors import UserError

Images = Literal["influence", "random"]


@dataclass(frozen=True)
class Probe:
    """The questions.

    Directions move as many images as the budget allows to poison, drawn at random for each
    direction, and every pixel of them by the same amount, its sign drawn at random too (and turned
    round where the pixel would leave [0, 1] on the way).

    Attributes:
        seeds: victims, each with its own initialisation, order and augmentation.
        directions: lines through the clean data, each trained along by every seed.
        h: step along a direction, in pixel units (1 is the whole range); lines reach to `2h`.
        images: which images the one-step gain and the agreement are of: the most influential
            ones, ranked as `mgd --start pixels` does and by seeds that are used for nothing else; or
            `random` ones, those of the first direction.
        step_sizes: sizes of the sign step, in pixel units, rising.
        points: points along each side of a landscape.
        extent: length of a landscape's sides, in pixel units.
        seed: of everything that is drawn.
    """

    seeds: int = 5
    directions: int = 5
    h: float = 0.05
    images: Images = "influence"
    step_sizes: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    points: int = 13
    extent: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seeds < 3:
            raise UserError("--seeds must be at least 3: agreement is of pairs, left out one at a time")
        if self.directions < 2:
            raise UserError("--directions must be at least 2: one alone gives no interval")
        if not 0 < self.h <= 0.25:
            raise UserError(f"--h must lie in (0, 0.25], so that lines stay in the pixels, not {self.h}")
        sizes = self.step_sizes
        if not sizes or not all(0 < size <= 1 for size in sizes):
            raise UserError("--step-size must lie in (0, 1]: 1 is the whole pixel range")
        if any(not a < b for a, b in zip(sizes, sizes[1:], strict=False)):
            raise UserError("--step-size: give every size once, the smallest first")
        if self.points < 2:
            raise UserError("--points must be at least 2")
        if not 0 < self.extent <= 0.25:
            raise UserError(f"--extent must lie in (0, 0.25], not {self.extent}")
