"""Label flips: attacks that draw nothing of their own, used as controls and as a start.

Flips spread over all classes blur every boundary a little. The same number concentrated on one class and
given one neighbour's label moves the boundary between the two, which costs more accuracy.

Where labels are fixed and pixels are free, the same wrong pairs of image and label can be had: a copy of
the image takes the place of one that bears the label. The victim mostly still sees the original under
its right label, which the flip would have taken away.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PRNGKeyArray

from poisonbench.arrays import chunks, drawn, highest
from poisonbench.attacks import Task
from poisonbench.errors import UserError
from poisonbench.journal import Journal
from poisonbench.problem import Problem, require_finite
from poisonbench.threat import Budget, PoisonSet
from poisonbench.victim.evaluation import train
from poisonbench.victim.training import Guard, TrainingRun, TrainingSet, logits


@dataclass(frozen=True)
class Flips:
    """Which images get which wrong labels.

    Attributes:
        indices: `[p]`, int64, into the training set.
        labels: `[p]`, int32.
    """

    indices: np.ndarray
    labels: np.ndarray


def require_flips(budget: Budget, name: str) -> None:
    """Refuse a budget under which no image can bear a wrong label.

    Raises:
        UserError: naming the options to change.
    """
    if not budget.can_flip:
        raise UserError(f"{name} needs wrong labels: give --labels free, or no --radius")


def placed(
    task: Task,
    flips: Flips,
    key: PRNGKeyArray | None = None,
    worth: Float[np.ndarray, " n"] | None = None,
) -> PoisonSet:
    """The poison in which these images bear these labels.

    Args:
        task: what the attacker knows. Under free labels the images bear the wrong labels themselves,
            or stand again beside the set where poison is added; under fixed ones, copies of the images
            take places of the labels' classes, which may be those of other images of the flips.
        flips: which images, and which labels.
        key: draws the places where no worth is given.
        worth: what losing each training image costs the victim; those that cost most give their
            places.

    Raises:
        UserError: a class has too few images to give so many places.
    """
    if task.budget.labels == "free":
        return task.poison(flips.indices, task.train_images[flips.indices], flips.labels)
    places = np.empty_like(flips.indices)
    for label in np.unique(flips.labels):
        members, here = np.flatnonzero(task.train_labels == label), flips.labels == label
        if len(members) < here.sum():
            raise UserError(
                f"class {label} has {len(members)} training images, fewer than the {here.sum()} places"
                " that copies would take: lower --fraction"
            )
        if worth is None:
            assert key is not None
            places[here] = drawn(members, int(here.sum()), jax.random.fold_in(key, int(label)))
        else:
            places[here] = highest(worth, int(here.sum()), members)
    return task.poison(places, task.train_images[flips.indices], task.train_labels[places])


def random_flips(task: Task, key: PRNGKeyArray) -> Flips:
    """Random images, each with a random wrong label."""
    pick, shift = jax.random.split(key)
    indices = task.random_indices(pick)
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
    indices = drawn(members, task.num_poison, key)
    return Flips(indices, np.full(len(indices), target, np.int32))


def confident_flips(task: Task, key: PRNGKeyArray, *, seeds: int) -> Flips:
    """The images that clean victims are surest of, each with the label they find least likely.

    Args:
        task: what the attacker knows.
        key: randomness of the victims.
        seeds: victims to train.
    """
    said = _probabilities(task, jax.random.split(key, seeds), task.train_images)
    own = np.arange(len(said)), task.train_labels
    surest = highest(said[own], task.num_poison)
    said[own] = np.inf  # the right label is no flip, even where it is the least likely one
    return Flips(surest, said[surest].argmin(1).astype(np.int32))


def best_concentrated_flips(
    task: Task,
    key: PRNGKeyArray,
    journal: Journal,
    *,
    candidates: int,
    seeds: int,
    guard: Guard | None = None,
) -> Flips:
    """The concentrated flips that hurt most on validation data.

    Class pairs are ranked by how much probability clean victims give to the wrong one, in either
    direction; flips of the first `candidates` pairs are tried out on `seeds` victims each.

    Args:
        task: what the attacker knows.
        key: randomness of victims and of the choice of images.
        journal: shows progress, and keeps what was tried. A caller that saves a checkpoint of its own
            afterwards must not search again when it finds that.
        candidates: ordered pairs to try.
        seeds: victims to train for each.
        guard: the defence in their steps that the victims train under; None for none.
    """
    victims = jax.random.split(jax.random.fold_in(key, 0), seeds)
    tried = journal.restore() or {}
    if "pairs" not in tried:
        tried = {"damage": np.zeros(0)}
        near = [pair for pair in _nearest_pairs(task, victims, guard) if _has_room(task, *pair)]
        tried["pairs"] = np.array(near[:candidates], np.int64).reshape(-1, 2)
        journal.save(tried)
    pairs = tried["pairs"].tolist()
    if not pairs:
        raise UserError("no class has as many images as the budget changes: lower --fraction")

    def flips(source: int, target: int) -> Flips:
        return concentrated_flips(task, source, target, jax.random.fold_in(key, 1))

    done = len(tried["damage"])
    with journal.progress("searching flips", len(pairs), done) as bar:
        for pair in pairs[done:]:
            poison = placed(task, flips(*pair), jax.random.fold_in(key, 2))
            damage = _validation_error(task, poison, victims, guard)
            # A victim that diverges says nothing of the flips.
            tried["damage"] = np.append(tried["damage"], damage if np.isfinite(damage) else -np.inf)
            journal.save(tried)
            bar.advance(note=" → ".join(task.class_names[c] for c in pair))
    require_finite(float(tried["damage"].max()))
    return flips(*pairs[int(tried["damage"].argmax())])


def _has_room(task: Task, source: int, target: int) -> bool:
    """Whether the source has images enough and, where copies take places, the target places enough."""
    sizes = np.bincount(task.train_labels, minlength=task.num_classes)
    needed = [source] if task.budget.labels == "free" else [source, target]
    return bool((sizes[needed] >= task.num_poison).all())


def _nearest_pairs(task: Task, keys: Key[Array, " seeds"], guard: Guard | None) -> list[tuple[int, int]]:
    """Ordered pairs of the classes that validation data have, the most confused first."""
    said = _probabilities(task, keys, task.val_images, guard)
    there = np.unique(task.val_labels).tolist()
    confusion = {c: said[task.val_labels == c].mean(0) for c in there}
    pairs = [(a, b) for a in there for b in there if a != b]
    return sorted(pairs, key=lambda pair: (-sum(confusion[a][b] for a, b in (pair, pair[::-1])), pair))


def _probabilities(
    task: Task, keys: Key[Array, " seeds"], images: np.ndarray, guard: Guard | None = None
) -> Float[np.ndarray, "m classes"]:
    """What victims trained on clean data say of images, on average.

    Raises:
        UserError: one of them diverged.
    """
    clean = TrainingSet.clean(task.train_images, task.train_labels, task.num_classes)
    run, state = TrainingRun.start(task.recipe, clean, keys, guard)
    state = train(run, state, jnp.zeros((0, *task.train_images.shape[1:])))

    @jax.jit
    def probabilities(state: object, images: jax.Array) -> jax.Array:
        said = jax.vmap(lambda s: logits(task.recipe, task.num_classes, s, images))(state)
        return jax.nn.softmax(said).mean(0)

    parts = [probabilities(state, jnp.asarray(images[rows]) / 255) for _, rows in chunks(len(images))]
    said = np.concatenate(parts)[: len(images)]
    if not np.isfinite(said).all():
        raise UserError(
            "a victim of clean data diverged: lower its learning rate, as by"
            " --set smooth.learning_rate=…"
        )
    return said


def _validation_error(
    task: Task, poison: PoisonSet, keys: Key[Array, " seeds"], guard: Guard | None
) -> float:
    return Problem.of(task, poison.indices, poison.labels, "error", guard).harm(poison.images, keys)
