"""Training victims under a defence, and what the defence did on the way.

The defended victim shares initialisation, order and augmentation with the undefended one of the same
key. Where images are dropped, others of those that are kept take their places in the order, drawn
without replacement as long as there are some; every victim takes the same number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, UInt8

from poisonbench.defenses import Composed, Predictions, View
from poisonbench.errors import UserError
from poisonbench.trained import TrainedVictim
from poisonbench.victim.evaluation import train_and_score_epochs
from poisonbench.victim.training import TrainingRun, TrainingSet, TrainState

DEFENSE = 0xDEF
"""Folded into a victim's key for what its defence draws."""


@dataclass(frozen=True)
class Defended:
    """What victims under a defence scored.

    Attributes:
        by_epoch: `[seeds, epochs]`, test accuracy in percent; of the picked epoch's victim from then on
            where one was picked.
        weights: `[seeds, n]`, how much each training image counted at the end; None where no image was
            weighed.
        certified: `[seeds, m]`, for how many changed training images each test answer is certified, and
            -1 where it is wrong; None where nothing is.
    """

    by_epoch: Float[np.ndarray, "seeds epochs"]
    weights: Float[np.ndarray, "seeds n"] | None = None
    certified: Int[np.ndarray, "seeds m"] | None = None


def train_and_score(
    defense: Composed,
    view: View,
    keys: Key[Array, " seeds"],
    images: UInt8[np.ndarray, "m h w c"],
    labels: Int[np.ndarray, " m"],
) -> Defended:
    """Train a defended victim for each key, and score it on test images after every epoch.

    Args:
        defense: as built.
        view: what it sees.
        keys: `[seeds]`, of the victims.
        images: `[m, height, width, channels]`, of the test split.
        labels: `[m]`, theirs.

    Raises:
        UserError: the defence drops every image.
    """
    own = [jax.random.fold_in(key, DEFENSE) for key in keys]
    if (said := _replaced(defense, view, own, images)) is not None:
        return _answered(said, view.recipe.epochs, labels)
    views = [replace(view, images=defense.preprocess(view, key)) for key in own]
    if all(np.array_equal(each.images, views[0].images) for each in views):
        return _together(defense, views[0], keys, own, images, labels)
    # Seeds whose training images differ cannot share a program's data.
    several = [
        _together(defense, each, keys[i : i + 1], own[i : i + 1], images, labels)
        for i, each in enumerate(views)
    ]
    rows = [d.weights for d in several]
    weights = None if rows[0] is None else np.concatenate([row for row in rows if row is not None])
    return Defended(np.concatenate([d.by_epoch for d in several]), weights)


def _together(
    defense: Composed,
    view: View,
    keys: Key[Array, " seeds"],
    own: list[PRNGKeyArray],
    images: np.ndarray,
    labels: np.ndarray,
) -> Defended:
    """Victims that train on the same images."""
    recipe, number = view.recipe, len(view.labels)
    weights = _stacked(defense, [defense.filter(view, key) for key in own], number)
    data = TrainingSet.clean(view.images, view.labels, view.num_classes)
    run, state = TrainingRun.start(recipe, data, keys, defense)
    order = np.asarray(run.order)
    run = _kept(run, order, weights)
    both = (np.concatenate([images, view.trusted_images]), np.concatenate([labels, view.trusted_labels]))
    every = defense.every or recipe.epochs
    rights: list[np.ndarray] = []
    for epoch in range(0, recipe.epochs, every):
        if epoch:
            now = np.ones((len(keys), number), np.float32) if weights is None else weights
            revised = _stacked(
                defense,
                [
                    defense.revise(view, _victim(view, state, i), epoch, now[i].astype(float))
                    for i in range(len(keys))
                ],
                number,
            )
            if revised is not None:
                weights = _stacked(defense, list(now * revised), number)
            run = _kept(run, order, weights)
        epochs = jnp.arange(epoch, min(epoch + every, recipe.epochs))
        state, right = train_and_score_epochs(run, state, epochs, *map(jnp.asarray, both))
        rights.append(np.asarray(right))
    right = np.concatenate(rights, axis=1)
    test = right[..., : len(labels)].mean(-1) * 100.0
    if len(view.trusted_labels):
        test = _picked(test, right[..., len(labels) :], defense.pick)
    return Defended(test, weights)


def _replaced(
    defense: Composed, view: View, keys: list[PRNGKeyArray], images: np.ndarray
) -> list[Predictions] | None:
    """What takes the place of each victim says of test images, which it meets once it is made."""
    said = []
    for key in keys:
        if (predict := defense.train(view, key)) is None:
            return None
        said.append(predict(images))
    return said


def _answered(said: list[Predictions], epochs: int, labels: np.ndarray) -> Defended:
    right = np.stack([p.classes == labels for p in said])
    by_epoch = np.repeat(right.mean(1, keepdims=True) * 100.0, epochs, axis=1)
    promised = [p.certified for p in said if p.certified is not None]
    certified = np.where(right, np.stack(promised), -1) if promised else None
    return Defended(by_epoch, None, certified)


def _picked(
    test: np.ndarray, trusted: np.ndarray, pick: Callable[[np.ndarray], int | None]
) -> np.ndarray:
    """Test accuracy by epoch, that of the picked epoch from it on.

    Args:
        test: `[seeds, epochs]`.
        trusted: `[seeds, epochs, m]`, which trusted images are right.
        pick: the defence's.
    """
    test = test.copy()
    for row, seen in zip(test, trusted, strict=True):
        epoch = pick(seen)
        if epoch is not None:
            row[epoch:] = row[epoch]
    return test


def _victim(view: View, state: TrainState, seed: int) -> TrainedVictim:
    alone = jax.tree.map(lambda x: x[seed], state)
    return TrainedVictim(view.recipe, view.num_classes, "all", alone)


def _stacked(
    defense: Composed, several: list[np.ndarray | None], number: int
) -> Float[np.ndarray, "seeds n"] | None:
    """Weights of all seeds; ones for those that have none."""
    if all(weights is None for weights in several):
        return None
    rows = [np.ones(number) if weights is None else weights for weights in several]
    if not all(row.any() for row in rows):
        raise UserError(f"{defense} drops every image of the training set: weaken it")
    return np.stack(rows).astype(np.float32)


def _kept(run: TrainingRun, order: np.ndarray, weights: np.ndarray | None) -> TrainingRun:
    """The run over the images of positive weight, each counting by its weight.

    Args:
        run: of all seeds.
        order: `[seeds, steps, batch]`, of the undefended victims.
        weights: `[seeds, n]`.
    """
    if weights is None:
        return run
    if (weights == 0).any():
        order = np.stack([_without(o, w, k) for o, w, k in zip(order, weights, run.keys, strict=True)])
    weighed = None if np.isin(weights, (0, 1)).all() else jnp.asarray(weights)
    return replace(run, order=jnp.asarray(order, jnp.int32), weights=weighed)


def _without(order: np.ndarray, weights: np.ndarray, key: PRNGKeyArray) -> np.ndarray:
    """The order with others in the places of images that weigh nothing, the rest where it was."""
    kept, dropped = np.flatnonzero(weights), weights[order] == 0
    further, fill = jax.random.fold_in(key, DEFENSE + 1), np.zeros(0, order.dtype)
    while len(fill) < dropped.sum():
        further, draw = jax.random.split(further)
        fill = np.concatenate([fill, np.asarray(jax.random.permutation(draw, kept), order.dtype)])
    changed = order.copy()
    changed[dropped] = fill[: dropped.sum()]
    return changed
