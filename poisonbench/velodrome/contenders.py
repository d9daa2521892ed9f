"""Who is judged: four optimizers that are tuned, and learned ones that are not.

A baseline is run at every learning rate of a grid, constant over the training. A learned optimizer has
no learning rate; it is told how long the training will be. That may be wrong in practice, and was found
to matter (Rezk et al., 2023, https://arxiv.org/abs/2310.18191), so it is run three times: told the
truth, 0.3 times and 3 times the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import optax
from jaxtyping import Array

from poisonbench.errors import UserError, unknown_name
from poisonbench.optimizers import FAMILIES, LearnedOptimizer
from poisonbench.optimizers.weights import digest, load_weights, packaged

Knob = Literal["learning_rate", "stated_steps"]

LEARNING_RATES = tuple(float(f"{10 ** (-7 + i / 2):.4g}") for i in range(15))
"""From 1e-7 to 1, two a decade."""
UNTUNED = 1e-3
"""Adam's learning rate where nobody tunes it."""
STATED = (0.3, 1.0, 3.0)
MOMENTUM = 0.9
DECAY = 1e-4
"""Weight decay times the learning rate, a step; little, for what is judged is training loss."""
ADAM = "adam"

BASELINES: Mapping[str, Callable[..., optax.GradientTransformation]] = MappingProxyType(
    {
        "sgdm": partial(optax.sgd, momentum=MOMENTUM),
        ADAM: optax.adam,
        "adamw": partial(optax.adamw, weight_decay=DECAY),
        "nadamw": partial(optax.nadamw, weight_decay=DECAY),
    }
)


@dataclass(frozen=True)
class Contender:
    """An optimizer with its settings.

    Attributes:
        name: names records.
        knob: what the settings are of.
        settings: each is a training of its own.
        config: all else that decides, for the record.
        build: the optimizer from a setting, which may be traced, the training's length in steps, and
            `weights`, which are None for baselines.
        weights: of a learned optimizer.
    """

    name: str
    knob: Knob
    settings: tuple[float, ...]
    config: dict[str, Any]
    build: Callable[[Array | float, int, Any], optax.GradientTransformationExtraArgs]
    weights: Any = None


def baseline(name: str) -> Contender:
    """One of `BASELINES`.

    Raises:
        UserError: there is none of that name.
    """
    if name not in BASELINES:
        raise unknown_name("optimizer", name, [*BASELINES, *FAMILIES])
    make = BASELINES[name]
    config = dict(make.keywords) if isinstance(make, partial) else {}

    def build(rate: Array | float, num_steps: int, weights: Any) -> Any:  # noqa: ARG001
        return optax.with_extra_args_support(make(rate))

    return Contender(name, "learning_rate", LEARNING_RATES, config, build)


def learned(family: str, path: Path | None, label: str | None) -> Contender:
    """A learned optimizer with the weights of a file, or with those that come with poisonbench.

    Args:
        family: of `poisonbench.optimizers.FAMILIES`.
        path: its weights; None for the packaged ones.
        label: name of its records; None for the family's.

    Raises:
        UserError: the weights cannot be read, or are of another family.
    """
    optimizer, weights = packaged(family) if path is None else load_weights(path)
    if optimizer.name != family:
        raise UserError(f"{path} holds weights of {optimizer.name}: give --optimizer {optimizer.name}")
    return of_weights(optimizer, weights, label or family)


def of_weights(optimizer: LearnedOptimizer, weights: Any, name: str) -> Contender:
    """A learned optimizer with weights at hand."""

    def build(stated: Array | float, num_steps: int, weights: Any) -> Any:
        return optimizer.transformation(stated * num_steps, weights)  # type: ignore[arg-type]

    config = {
        "family": optimizer.name, "sizes": asdict(optimizer), "weights": digest(weights),  # type: ignore[call-overload]
    }  # fmt: skip
    return Contender(name, "stated_steps", STATED, config, build, weights)
