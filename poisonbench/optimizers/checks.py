"""Where learned optimizers meet the rest: what comes in, what is refused, and what goes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_leaves_with_path
from jaxtyping import Array

from poisonbench.errors import UserError

PyTree = Any
Tensors = list[Array]
GRADIENT_BOUND = 1000.0


def require_num_steps(num_steps: object) -> None:
    """A training's length must be stated; one that is traced cannot be looked at.

    Raises:
        UserError: it is missing, or not a positive number.
    """
    if isinstance(num_steps, jax.core.Tracer):
        return
    if isinstance(num_steps, Mapping):
        raise UserError("num_steps comes first, then the weights")
    if num_steps is None or isinstance(num_steps, bool) or jnp.ndim(num_steps):  # type: ignore[arg-type]
        raise UserError("a learned optimizer needs num_steps, the length of the whole training")
    if not num_steps >= 1:  # type: ignore[operator]
        raise UserError(f"num_steps must be at least 1, not {num_steps}")


def tensors(tree: PyTree, what: str, like: Tensors | None = None) -> Tensors:
    """The leaves of a tree of parameters or gradients, in JAX's order; scalars get shape (1,).

    Args:
        tree: parameters or gradients.
        what: their name in errors.
        like: the parameters that gradients belong to.

    Raises:
        UserError: they were left out, there are none, they are not all float32 (or all float64), or
            not shaped as `like`.
    """
    if tree is None:
        raise UserError(f"the {what} are missing: call update(gradients, state, params, value=loss)")
    leaves = [(keystr(path), jnp.asarray(leaf)) for path, leaf in tree_leaves_with_path(tree)]
    if not leaves:
        raise UserError(f"there are no {what}: the tree is empty")
    first = leaves[0][1].dtype if like is None else like[0].dtype
    for path, leaf in leaves:
        if leaf.dtype not in (jnp.float32, jnp.float64) or leaf.dtype != first:
            raise UserError(
                f"{what} must all be float32: {path or 'the first'} has {leaf.dtype} beside {first};"
                " keep them in float32 and cast inside the loss"
            )
    found = [leaf.reshape(leaf.shape or (1,)) for _, leaf in leaves]
    if like is not None and [x.shape for x in found] != [x.shape for x in like]:
        raise UserError(f"{what} do not have the shapes of the parameters")
    return found


def cut(gradients: Tensors) -> Tensors:
    """Gradients within ±1000, element by element."""
    return [jnp.clip(g, -GRADIENT_BOUND, GRADIENT_BOUND) for g in gradients]


def shaped_like(params: PyTree, moves: Tensors) -> PyTree:
    """What is to be added to each parameter, in the structure and the shapes of the parameters."""
    leaves, structure = jax.tree.flatten(params)
    shaped = [move.reshape(jnp.shape(leaf)) for move, leaf in zip(moves, leaves, strict=True)]
    return jax.tree.unflatten(structure, shaped)


def require_loss(value: object, dtype: Any) -> Array:
    """The loss of this step, as a scalar of the parameters' type.

    Raises:
        UserError: it is missing, or no scalar.
    """
    if value is None:
        raise UserError(
            "a learned optimizer reads the loss: call update(gradients, state, params, value=loss)"
        )
    loss = jnp.asarray(value, dtype)
    if loss.ndim:
        raise UserError(f"value must be a scalar loss, not an array of shape {loss.shape}")
    return loss


def require_shapes(weights: object, wanted: Mapping[str, Any], name: str, path: str = "") -> None:
    """Hold nested weights against the shapes that they must have.

    Raises:
        UserError: one is missing, too many, no array, or of another shape.
    """
    where = path or "the top"
    if not isinstance(weights, Mapping):
        raise UserError(f"weights of {name}: {where} must be a dictionary, not {type(weights).__name__}")
    if odd := sorted(set(map(str, weights)) ^ set(wanted)):
        state = "missing" if odd[0] in wanted else "unknown"
        raise UserError(
            f"weights of {name}: {odd[0]} at {where} is {state}: is this another optimizer's file?"
        )
    for key, shape in wanted.items():
        inner = f"{path}/{key}" if path else key
        if isinstance(shape, Mapping):
            require_shapes(weights[key], shape, name, inner)
            continue
        found = getattr(weights[key], "shape", None)
        if found is None or tuple(found) != shape:
            raise UserError(f"weights of {name}: {inner} must have the shape {shape}, not {found}")
