"""The optimizer that a recipe names, with its schedule: one of optax, or a learnt one."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
import optax

from poisonbench.errors import UserError, unknown_name
from poisonbench.optimizers import FAMILIES, LearnedOptimizer, Weights
from poisonbench.optimizers.weights import packaged
from poisonbench.victim.recipe import LEARNED, Recipe


def make_optimizer(recipe: Recipe, num_steps: int) -> optax.GradientTransformation:
    """The recipe's optimizer with its schedule over `num_steps` steps.

    Raises:
        UserError: no optimizer of that name, or one that takes other arguments.
    """
    if recipe.optimizer in FAMILIES:
        return _with_decay(_learned(recipe, num_steps), recipe)
    named: Callable[..., optax.GradientTransformation] | None
    named = getattr(optax, recipe.optimizer, None)
    if named is None:
        known = [name for name in dir(optax) if name.islower() and not name.startswith("_")]
        raise unknown_name("optimizer", recipe.optimizer, [*known, *FAMILIES])
    try:
        optimizer = named(learning_rate_schedule(recipe, num_steps), **dict(recipe.optimizer_options))
        if not isinstance(optimizer, optax.GradientTransformation):
            raise TypeError("it is no optimizer with a learning rate")
    except (TypeError, AttributeError) as error:
        raise UserError(
            f"optimizer {recipe.optimizer} does not take {dict(recipe.optimizer_options)}: {error}"
        ) from None
    return _with_decay(optimizer, recipe)


def _learned(recipe: Recipe, num_steps: int) -> optax.GradientTransformation:
    name, options = recipe.optimizer, dict(recipe.optimizer_options)
    wanted = options.pop("weights", LEARNED[name])
    if options:
        raise UserError(f"optimizer {name} has nothing to set: add --set optimizer_options={{}}")
    if wanted != LEARNED[name]:
        raise UserError(f"weights {wanted} of {name} are not those of this version, {LEARNED[name]}")
    optimizer, weights = _weights(name)
    return optimizer.transformation(num_steps, weights)


@lru_cache
def _weights(name: str) -> tuple[LearnedOptimizer, Weights]:
    # Numbers, and not part of whatever is being traced when they are first asked for.
    with jax.ensure_compile_time_eval():
        return packaged(name)


def _with_decay(optimizer: optax.GradientTransformation, recipe: Recipe) -> optax.GradientTransformation:
    if not recipe.weight_decay:
        return optimizer
    decay = optax.add_decayed_weights(
        recipe.weight_decay, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    )
    return optax.chain(decay, optimizer)


def learning_rate_schedule(recipe: Recipe, num_steps: int) -> optax.Schedule:
    """Step number to learning rate."""
    peak = recipe.learning_rate
    if recipe.schedule == "constant":
        return optax.constant_schedule(peak)
    knots = (0.0, recipe.peak_at * num_steps, float(num_steps))
    values = (peak * recipe.start_factor, peak, peak * recipe.final_factor)
    return lambda t: jnp.interp(t, jnp.array(knots), jnp.array(values))
