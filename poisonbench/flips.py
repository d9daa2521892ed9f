"""Label flips: the strongest attack that touches no pixel, used as control and as a start.

Flips spread over all classes hardly hurt. The same number concentrated on one class and given one
neighbour's label moves the boundary between the two, and costs many times the accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PRNGKeyArray

from poisonbench.attacks import Task
from poisonbench.errors import UserError
from poisonbench.journal import Journal
from poisonbench.victim.evaluation import ValidationLoss, train
from poisonbench.victim.training import TrainingRun, TrainingSet, logits


@dataclass(frozen=True)
class Flips:
    """Which images get which wrong labels.

    Attributes:
        indices: `[p]`, int64, into the training set.
        labels: `[p]`, int32.
    """

    indices: np.ndarray
    labels: np.ndarray


def chosen_at_random(task: Task, key: PRNGKeyArray) -> Flips:
    """As many images as the budget allows, drawn without replacement, with their own labels."""
    indices = _choose(np.arange(len(task.train_labels)), task.num_poison, key)
    return Flips(indices, task.train_labels[indices])


def random_flips(task: Task, key: PRNGKeyArray) -> Flips:
    """Random images, each with a random wrong label."""
    pick, shift = jax.random.split(key)
    indices = chosen_at_random(task, pick).indices
    shifts = np.asarray(jax.random.randint(shift, (len(indices),), 1, task.num_classes))
    return Flips(indices, ((task.train_labels[indices] + shifts) % task.num_classes).astype(np.int32))


def concentrated_flips(task: Task, source: int, target: int, key: PRNGKeyArray) -> Flips:
    """Random images of class `source`, all labelled `target`.

    Raises:
        UserError: the class has fewer images than the budget allows to change, or no such class.
    """
    for name, label in (("source", source), ("target", target)):
        if not 0 <= label < task.num_classes:
            raise UserError(f"--{name} {label}: classes go from 0 to {task.num_classes - 1}")
    if source == target:
        raise UserError("--source and --target must differ")
    members = np.flatnonzero(task.train_labels == source)
    if len(members) < task.num_poison:
        raise UserError(
            f"class {source} has {len(members)} training images, fewer than the {task.num_poison}"
            " to flip: lower --fraction"
        )
    indices = _choose(members, task.num_poison, key)
    return Flips(indices, np.full(len(indices), target, np.int32))


def confident_flips(task: Task, key: PRNGKeyArray, *, seeds: int) -> Flips:
    """The images that clean victims are surest of, each with the label they find least likely.

    Args:
        task: what the attacker knows.
        key: randomness of the victims.
        seeds: victims to train.
    """
    said = _probabilities(task, jax.random.split(key, seeds), task.train_images)
    sureness = said[np.arange(len(said)), task.train_labels]
    surest = np.sort(np.argsort(-sureness, kind="stable")[: task.num_poison])
    return Flips(surest.astype(np.int64), said[surest].argmin(1).astype(np.int32))


def best_concentrated_flips(
    task: Task, key: PRNGKeyArray, journal: Journal, *, candidates: int, seeds: int
) -> Flips:
    """The concentrated flips that hurt most on validation data.

    Class pairs are ranked by how much probability clean victims give to the wrong one, in either
    direction; flips of the first `candidates` pairs are tried out on `seeds` victims each.

    Args:
        task: what the attacker knows.
        key: randomness of victims and of the choice of images.
        journal: shows progress.
        candidates: ordered pairs to try.
        seeds: victims to train for each.
    """
    victims = jax.random.split(jax.random.fold_in(key, 0), seeds)
    pairs = _nearest_pairs(task, victims)[:candidates]
    best: tuple[float, Flips] | None = None
    with journal.progress("searching flips", len(pairs)) as bar:
        for source, target in pairs:
            if np.sum(task.train_labels == source) < task.num_poison:
                continue
            flips = concentrated_flips(task, source, target, jax.random.fold_in(key, 1))
            damage = _validation_error(task, flips, victims)
            if best is None or damage > best[0]:
                best = damage, flips
            bar.advance(note=f"{task.class_names[source]} → {task.class_names[target]}")
    if best is None:
        raise UserError("no class has as many images as the budget changes: lower --fraction")
    return best[1]


def _choose(rows: np.ndarray, count: int, key: PRNGKeyArray) -> np.ndarray:
    return np.sort(np.asarray(jax.random.choice(key, rows, (count,), replace=False), np.int64))


def _nearest_pairs(task: Task, keys: Key[Array, " seeds"]) -> list[tuple[int, int]]:
    """Ordered pairs of classes, the most confused first."""
    said = _probabilities(task, keys, task.val_images)
    confusion = np.stack([said[task.val_labels == c].mean(0) for c in range(task.num_classes)])
    closeness = confusion + confusion.T
    pairs = [(a, b) for a in range(task.num_classes) for b in range(task.num_classes) if a != b]
    return sorted(pairs, key=lambda pair: (-closeness[pair], pair))


def _probabilities(
    task: Task, keys: Key[Array, " seeds"], images: np.ndarray
) -> Float[np.ndarray, "m classes"]:
    """What victims trained on clean data say of images, on average."""
    clean = TrainingSet.clean(task.train_images, task.train_labels, task.num_classes)
    state = _trained(task, clean, keys)

    @jax.jit
    def probabilities(state: object, images: jax.Array) -> jax.Array:
        said = jax.vmap(lambda s: logits(task.recipe, task.num_classes, s, images))(state)
        return jax.nn.softmax(said).mean(0)

    chunks = [images[i : i + 500] for i in range(0, len(images), 500)]
    return np.concatenate([probabilities(state, jnp.asarray(chunk) / 255) for chunk in chunks])


def _validation_error(task: Task, flips: Flips, keys: Key[Array, " seeds"]) -> float:
    labels = np.array(task.train_labels)
    labels[flips.indices] = flips.labels
    data = TrainingSet.clean(task.train_images, labels, task.num_classes)
    loss = ValidationLoss(
        task.recipe,
        task.num_classes,
        "error",
        jnp.asarray(task.val_images),
        jnp.asarray(task.val_labels),
    )
    return float(jax.jit(lambda loss, state: loss(state))(loss, _trained(task, data, keys)))


def _trained(task: Task, data: TrainingSet, keys: Key[Array, " seeds"]) -> object:
    run, state = TrainingRun.start(task.recipe, data, keys)
    return train(run, state, jnp.zeros((0, *task.train_images.shape[1:])))
