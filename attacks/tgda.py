"""Total gradient descent ascent: a generator of poison leads a victim, differentiated implicitly.

A game between a generator G with parameters θ, which turns a clean image and its label into a poisoned
one, and a victim with weights w that trains on clean and poisoned data, of loss f(θ, w). The leader
climbs the victim's loss F(w) on held-out data. Were the victim at a minimum of f for every θ, the
derivative of F would be total,

    D_θ F = -∂²_{θw} f (∂²_{ww} f)⁻¹ ∂_w F,

the inverse applied by conjugate gradients. In each round the leader takes one step along it, on a
victim that is not at its minimum, and the victim takes twenty of descent on f.

Paper: Lu, Kamath and Yu, "Indiscriminate Data Poisoning Attacks on Neural Networks", TMLR 2022,
https://arxiv.org/abs/2204.09092: 3 % added, 16 iterations of conjugate gradients, steps of 0.01 and 0.1.

What is left open, and how it is settled here:

- *The generator.* Two 3×3 convolutions over the image and planes of its label, added to the image
  before a sigmoid onto the pixels that the budget allows. The last layer starts at zero, so that the
  first poison is the clean image, to a hundredth of the range, and nothing need be trained beforehand.
- *The follower* starts from a victim trained on clean data; its batch norm keeps that victim's
  statistics. It takes plain gradient steps, whose size is an option, on batches of the poisoned set.
- *The Hessian* is that of f on a batch, plus a multiple of the identity: away from a minimum it is
  not positive.
- *Augmentation*: neither player sees any, also where the victim's recipe flips and crops.
- *The leader's step* is Adam's, since the scale of a generator's parameters says nothing.
- *The game.* The paper adds its points (`--mode add`); here they may also take the place of clean ones.
- *Which poison is kept*: the best of several rounds by victims trained on it, not the last.

Published: no figure for this game was at hand.

Measured on `digits` (12 of 500 images, fixed labels, ten pairs of smooth victims): 0.22 ± 0.29 points
lost, no more than to noise; on `cifar10-small` (100 of 4,000) 0.53 ± 0.31, and to noise 0.50 ± 0.48.
Held-out loss of victims trained on the poison hardly moves: at the six checks on `cifar10-small` it is
1.407 to 1.416.

Cost: in each round, twenty steps on a batch and 17 second-order products, about as much as 60 steps of
training; and `check_seeds` victim trainings at every check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from poisonbench.arrays import to_pixels
from poisonbench.attacks import Attack, Task, require_at_least_one, require_positive
from poisonbench.errors import UserError
from poisonbench.journal import Journal, pack, unpack
from poisonbench.problem import Problem, clean_victim, require_finite
from poisonbench.threat import PoisonSet
from poisonbench.trained import TrainedVictim
from poisonbench.victim.convolution import convolve, for_backend

PyTree = Any
HIDDEN = 32
BATCH = 250


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Game:
    """Everything that stays the same from round to round.

    Attributes:
        victim: the follower at its start.
        images, labels: the clean training set; `[n, h, w, c]` uint8 and `[n]`.
        slot: `[n]`, the poison that takes an image's place, or -1.
        poisoned: `[p]`, the images whose place poison takes.
        low, high: `[p, h, w, c]`, the pixels that the budget allows.
        held_out, truth: what the leader climbs the loss of.
    """

    victim: TrainedVictim
    images: Array
    labels: Array
    slot: Array
    poisoned: Array
    low: Array
    high: Array
    held_out: Array
    truth: Array

    def poison(self, theta: PyTree) -> Float[Array, "p h w c"]:
        """What the generator makes of the images that it may change."""
        clean = self.images[self.poisoned].astype(jnp.float32) / 255
        planes = jax.nn.one_hot(self.labels[self.poisoned], self.victim.num_classes)
        shape = (*clean.shape[:3], self.victim.num_classes)
        inputs = jnp.concatenate([clean, jnp.broadcast_to(planes[:, None, None], shape)], axis=-1)
        hidden = jax.nn.gelu(_layer(inputs, theta["first"]))
        # Off the ends of the range, where no step would ever move a pixel.
        share = (clean - self.low) / jnp.maximum(self.high - self.low, 1e-6)
        moved = jax.scipy.special.logit(jnp.clip(share, 0.01, 0.99)) + _layer(hidden, theta["last"])
        return self.low + (self.high - self.low) * jax.nn.sigmoid(moved)

    def loss(
        self, poison: Float[Array, "p h w c"], weights: PyTree, rows: Int[Array, " b"]
    ) -> Float[Array, ""]:
        """The follower's f on a batch: the mean loss of these images of the poisoned set."""
        slot = self.slot[rows]
        clean = self.images[rows].astype(jnp.float32) / 255
        pixels = poison[jnp.maximum(slot, 0)]
        images = jnp.where((slot >= 0)[:, None, None, None], pixels, clean)
        ones = jnp.ones(len(rows))
        return self.victim.loss(weights, images, self.labels[rows], ones) / len(rows)

    def poisoned_loss(self, theta: PyTree, weights: PyTree) -> Float[Array, ""]:
        """The part of f that the leader has a hand in."""
        ones = jnp.ones(len(self.poisoned))
        labels = self.labels[self.poisoned]
        return self.victim.loss(weights, self.poison(theta), labels, ones) / len(self.labels)

    def climbed(self, weights: PyTree, rows: Int[Array, " b"]) -> Float[Array, ""]:
        """The leader's F on a batch of held-out images."""
        images = self.held_out[rows].astype(jnp.float32) / 255
        return self.victim.loss(weights, images, self.truth[rows], jnp.ones(len(rows))) / len(rows)


@dataclass(frozen=True)
class TGDA(Attack):
    """Total gradient descent ascent.

    Attributes:
        rounds: of one leader step and `follower_steps` of the follower.
        leader_rate: Adam's step size on the generator's parameters.
        follower_steps: of gradient descent in a round.
        follower_rate: their step size.
        iterations: of conjugate gradients.
        damping: multiple of the identity that is added to the Hessian.
        check_every: rounds between checks by victims trained on the poison.
        check_seeds: victims trained for a check.
    """

    rounds: int = 60
    leader_rate: float = 0.01
    follower_steps: int = 20
    follower_rate: float = 0.1
    iterations: int = 16
    damping: float = 0.1
    check_every: int = 10
    check_seeds: int = 3

    def __post_init__(self) -> None:
        require_at_least_one(
            self, "rounds", "follower_steps", "iterations", "check_every", "check_seeds"
        )
        require_positive(self, "leader_rate", "follower_rate", "damping")

    def craft(self, task: Task, key: PRNGKeyArray, journal: Journal) -> PoisonSet:
        """Play the rounds; the poison of the check that did most harm is the result."""
        pick, clean_key, start_key, round_key, check_key = jax.random.split(key, 5)
        indices = task.random_indices(pick)
        labels, images = task.train_labels[indices], task.train_images[indices]
        problem = Problem.of(task, indices, labels, "cross_entropy")
        game = _Game(
            clean_victim(task, clean_key), problem.data.images, problem.data.labels,
            problem.data.slot, jnp.asarray(indices, jnp.int32), problem.low, problem.high,
            problem.loss.images, problem.loss.labels,
        )  # fmt: skip
        theta = _generator(start_key, task)
        players = (theta, optax.adam(self.leader_rate).init(theta), game.victim.weights)
        start = {"done": np.array(0), "best": images, "value": np.array(-np.inf)}
        arrays = journal.restore() or start | pack(players, "players")
        players = unpack(arrays, "players", players)
        check_keys = jax.random.split(check_key, self.check_seeds)
        with journal.progress("crafting tgda", self.rounds, int(arrays["done"])) as bar:
            for i in range(int(arrays["done"]), self.rounds):
                players, loss = _round(self, game, players, jax.random.fold_in(round_key, i))
                if not np.isfinite(float(loss)):
                    raise UserError(
                        f"at round {i} the victim's loss is not finite: lower --follower-rate"
                    )
                row = {"metastep": i + 1, "loss": float(loss)}
                if (i + 1) % self.check_every == 0 or i + 1 == self.rounds:
                    made = _poison(game, players[0])
                    if not np.isfinite(made).all():
                        raise UserError(
                            f"at round {i} the generator's pixels are not finite: lower --leader-rate"
                        )
                    images = to_pixels(made)
                    row["held_out_loss"] = value = problem.harm(images, check_keys)
                    if value > arrays["value"]:
                        arrays |= {"best": images, "value": np.array(value)}
                arrays |= {"done": np.array(i + 1), **pack(players, "players")}
                journal.save(arrays, row)
                bar.advance(note=f"loss {float(loss):.3f}")
        require_finite(float(arrays["value"]))
        return task.poison(indices, arrays["best"], labels)


def _generator(key: PRNGKeyArray, task: Task) -> PyTree:
    channels = task.train_images.shape[-1]
    initial = jax.nn.initializers.he_normal()
    first = initial(key, (3, 3, channels + task.num_classes, HIDDEN))
    return {
        "first": {"kernel": first, "bias": jnp.zeros(HIDDEN)},
        "last": {"kernel": jnp.zeros((3, 3, HIDDEN, channels)), "bias": jnp.zeros(channels)},
    }


def _layer(x: Array, layer: PyTree) -> Array:
    return convolve(x, layer["kernel"], for_backend()) + layer["bias"][None, None, None]


_poison = jax.jit(lambda game, theta: game.poison(theta))


@jax.jit(static_argnums=0)
def _round(
    attack: TGDA, game: _Game, players: tuple[PyTree, PyTree, PyTree], key: PRNGKeyArray
) -> tuple[tuple[PyTree, PyTree, PyTree], Float[Array, ""]]:
    """The leader's step, the follower's steps; and the held-out loss before them."""
    theta, optimizer, weights = players
    hessian_key, held_out_key, follower_key = jax.random.split(key, 3)

    def some(key: PRNGKeyArray, number: int) -> Array:
        return jax.random.choice(key, number, (min(BATCH, number),), replace=False)

    rows = some(hessian_key, len(game.labels))
    value, uphill = jax.value_and_grad(game.climbed)(weights, some(held_out_key, len(game.truth)))
    slope = jax.grad(game.loss, argnums=1)
    poison = game.poison(theta)
    ascent = total_derivative(
        lambda w: slope(poison, w, rows), game.poisoned_loss, theta, weights, uphill,
        attack.iterations, attack.damping,
    )  # fmt: skip
    updates, optimizer = optax.adam(attack.leader_rate).update(
        jax.tree.map(jnp.negative, ascent), optimizer
    )
    theta = optax.apply_updates(theta, updates)
    answered = game.poison(theta)

    def descend(i: Array, weights: PyTree) -> PyTree:
        batch = some(jax.random.fold_in(follower_key, i), len(game.labels))
        step = slope(answered, weights, batch)
        return jax.tree.map(lambda w, g: w - attack.follower_rate * g, weights, step)

    weights = jax.lax.fori_loop(0, attack.follower_steps, descend, weights)
    return (theta, optimizer, weights), value


def total_derivative(
    slope: Callable[[PyTree], PyTree],
    led: Callable[[PyTree, PyTree], Float[Array, ""]],
    theta: PyTree,
    weights: PyTree,
    uphill: PyTree,
    iterations: int | Int[Array, ""],
    damping: float,
) -> PyTree:
    """How F changes with θ where the follower answers: -∂²_{θw} f (∂²_{ww} f + damping I)⁻¹ ∂_w F.

    It is exact where the weights are a minimum of f, plus half the damping times their squares, and the
    conjugate gradients have come to their end: after as many iterations as there are weights, or at a
    residual of a hundred-thousandth.

    Args:
        slope: ∂_w f by the weights, at this θ.
        led: the part of f that θ has a hand in, by θ and the weights.
        theta: the leader's parameters.
        weights: the follower's.
        uphill: ∂_w F, of their structure.
        iterations: of conjugate gradients, at most.
        damping: multiple of the identity that is added to the Hessian.
    """

    def damped_hessian(v: PyTree) -> PyTree:
        # By two reverse passes: the victim's convolutions have no forward mode.
        product = jax.grad(lambda w: _inner(slope(w), v))(weights)
        return jax.tree.map(lambda h, x: h + damping * x, product, v)

    solved, _ = jax.scipy.sparse.linalg.cg(damped_hessian, uphill, maxiter=iterations)

    def against(theta: PyTree) -> Array:
        return -_inner(jax.grad(led, argnums=1)(theta, weights), solved)

    return jax.grad(against)(theta)


def _inner(a: PyTree, b: PyTree) -> Float[Array, ""]:
    return jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, a, b))
