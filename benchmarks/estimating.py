"""What estimates of a metagradient are worth: drawn many times, and held against the smoothed truth.

The truth is the gradient of the smoothed meta-loss, `E ∇L(θ+ε)` with `ε ~ N(0, σ²I)`, over runs (initial
parameters and batches) as well: every draw has a run and an ε of its own, for the truth and for all
estimators alike. It is computed by averaging exact gradients at θ+ε; a second, independent reference is
the mean of all ES estimates, which needs no derivative. The cosine between the halves of either says how
far it can be trusted, for no cosine with a noisy reference can reach 1.

Compute is counted in forward inner steps. A differentiated step counts as `factor` of them, measured as
processor time on this machine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import _Frozen
from poisonbench.metatraining import estimators
from poisonbench.metatraining.estimators import ES, PES, Estimate, Exact, Truncated
from poisonbench.metatraining.unroll import Problem, Weights

TOGETHER = 16
"""Estimates in one program."""
BUDGETS = (1, 10)
"""Equal compute, in exact gradients."""


class Quality(_Frozen):
    """One estimator at one length of run.

    Attributes:
        point: `start` or `trained`, the weights that gradients are taken at.
        estimator: its name.
        num_steps: of a run.
        draws: estimates.
        cost: of one, in forward steps.
        cosine: of single estimates with the truth, the mean, and `low` and `high` its 10 and 90 %.
        cosine_mean: of the mean of all draws with the truth.
        cosine_equal: of the mean of as many as equal compute affords, for each of `BUDGETS`.
        noise: mean squared deviation from their mean, over the squared norm of the truth. It says
            little of windows, whose gradients are shorter than the truth, most of all in long runs.
        noise_compute: `noise` times cost, over that of a run's steps: what a unit of compute leaves.
        largest: largest norm over the median norm.
        broken: estimates in which something was not finite.
    """

    point: str
    estimator: str
    num_steps: int
    draws: int
    cost: float
    cosine: float
    low: float
    high: float
    cosine_mean: float
    cosine_equal: tuple[float, ...]
    noise: float
    noise_compute: float
    largest: float
    broken: int


class Truth(_Frozen):
    """What the estimators of one length are held against.

    Attributes:
        norm: of the truth.
        halves: cosine between the means of its two halves.
        es_halves: the same of the ES reference.
        agreement: cosine between the two references.
        attainable: what `agreement` would be if both only differed by their noise.
    """

    point: str
    num_steps: int
    draws: int
    es_draws: int
    norm: float
    halves: float
    es_halves: float
    agreement: float
    attainable: float


@dataclass(frozen=True)
class Sample:
    """Estimates `[draws, weights]`, and how many were broken."""

    gradients: np.ndarray
    broken: int


def sample(estimator: Any, problem: Problem, weights: Weights, num_steps: int, draws: int) -> Sample:
    """Independent estimates; those of a part of a run are means over the parts of a whole one."""
    calls = _parts(estimator, num_steps)
    found, broken = [], 0
    for i in range(-(-draws // TOGETHER)):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(17), i), (calls + 1, TOGETHER))
        carry = estimators.begin(estimator, problem, weights, keys[-1])
        total: Any = 0.0
        for call in range(calls):
            estimate = estimators.estimates(estimator, problem, weights, num_steps, keys[call], carry)
            carry, total = estimate.carry, total + _flat(estimate.gradient)
            broken += int((np.asarray(estimate.broken) > 0).sum())
        found.append(total / calls)
    return Sample(np.concatenate(found)[:draws], broken)


def smoothed(
    exact: Exact, problem: Problem, weights: Weights, sigma: float, num_steps: int, draws: int
) -> Sample:
    """Exact gradients at perturbed weights, each of a run of its own."""
    found, broken = [], 0
    for i in range(-(-draws // TOGETHER)):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(23), i), TOGETHER)
        estimate = _perturbed(exact, sigma, problem, weights, jnp.int32(num_steps), keys)
        found.append(_flat(estimate.gradient))
        broken += int(np.asarray(estimate.broken).sum())
    return Sample(np.concatenate(found)[:draws], broken)


@partial(jax.jit, static_argnums=(0, 1))
def _perturbed(
    exact: Exact, sigma: float, problem: Problem, weights: Weights, num_steps: Any, keys: Any
) -> Estimate:
    def one(key: Any) -> Estimate:
        draw, run = jax.random.split(key)
        leaves, structure = jax.tree.flatten(weights)
        own = jax.random.split(draw, len(leaves))
        moved = [w + sigma * jax.random.normal(k, w.shape) for k, w in zip(own, leaves, strict=True)]
        return exact(problem, jax.tree.unflatten(structure, moved), num_steps, run, ())

    return jax.vmap(one)(keys)


def measured_factor(problem: Problem, weights: Weights, num_steps: int = 30, rounds: int = 5) -> float:
    """Processor time of a differentiated step over that of one forward, least of several rounds."""
    keys = jax.random.split(jax.random.key(0), TOGETHER)

    def seconds(estimator: Any) -> float:
        taken = []
        for _ in range(rounds + 1):
            began = time.process_time()
            jax.block_until_ready(estimators.estimates(estimator, problem, weights, num_steps, keys, ()))
            taken.append(time.process_time() - began)
        return min(taken[1:])

    forward = seconds(ES()) / 2
    return seconds(Exact(num_steps)) / forward - 1


def truth(point: str, num_steps: int, exact: np.ndarray, es: np.ndarray) -> tuple[Truth, np.ndarray]:
    """The reference, and how far it can be trusted."""
    halves, es_halves = _halves(exact), _halves(es)
    # A mean of all has twice the information of a half: cos² of signal and mean, from that of halves.
    shares = [2 * max(0.0, h) / (1 + max(0.0, h)) for h in (halves, es_halves)]
    reference = exact.mean(0)
    found = Truth(
        point=point, num_steps=num_steps, draws=len(exact), es_draws=len(es),
        norm=float(np.linalg.norm(reference)), halves=halves, es_halves=es_halves,
        agreement=cosine(reference, es.mean(0)), attainable=float(np.sqrt(shares[0] * shares[1])),
    )  # fmt: skip
    return found, reference


def quality(
    point: str, name: str, num_steps: int, found: Sample, cost: float, exact_cost: float,
    reference: np.ndarray,
) -> Quality:  # fmt: skip
    """What these estimates are worth."""
    gradients = found.gradients
    cosines = np.array([cosine(g, reference) for g in gradients])
    mean, norms = gradients.mean(0), np.linalg.norm(gradients, axis=1)
    noise = float(((gradients - mean) ** 2).sum(1).mean() * len(gradients) / (len(gradients) - 1))
    noise /= float((reference**2).sum())
    if name == "es-sign":  # it has a scale of its own: brought to the truth's length along the truth
        noise *= float((reference**2).sum() / max(1e-30, mean @ reference)) ** 2
    return Quality(
        point=point, estimator=name, num_steps=num_steps, draws=len(gradients), cost=cost,
        cosine=float(cosines.mean()), low=float(np.quantile(cosines, 0.1)),
        high=float(np.quantile(cosines, 0.9)), cosine_mean=cosine(mean, reference),
        cosine_equal=tuple(_averaged(gradients, reference, b * exact_cost / cost) for b in BUDGETS),
        noise=noise, noise_compute=noise * cost / num_steps,
        largest=float(norms.max() / max(1e-30, np.median(norms))), broken=found.broken,
    )  # fmt: skip


def _averaged(gradients: np.ndarray, reference: np.ndarray, count: float) -> float:
    """Mean cosine of means of `count` estimates, drawn from these without replacement."""
    count, rng = max(1, min(round(count), len(gradients))), np.random.default_rng(0)
    means = [gradients[rng.permutation(len(gradients))[:count]].mean(0) for _ in range(100)]
    return float(np.mean([cosine(mean, reference) for mean in means]))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Between two vectors; 0 where either is nothing."""
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / lengths if lengths > 0 else 0.0


def _halves(gradients: np.ndarray) -> float:
    return cosine(gradients[::2].mean(0), gradients[1::2].mean(0))


def _flat(gradients: Any) -> np.ndarray:
    leaves = [np.asarray(g, np.float64) for g in jax.tree.leaves(gradients)]
    return np.concatenate([g.reshape(len(g), -1) for g in leaves], axis=1)


def strategies(sigma: float, num_steps: int, longest: int | None = None) -> dict[str, Any]:
    """The estimators that are compared; truncations are a tenth of a run, at least 10 steps.

    Exact gradients of all runs up to `longest` share a program.
    """
    truncation = max(10, num_steps // 10)
    return {
        "exact": Exact(longest or num_steps),
        "es": ES(sigma),
        "es-sign": ES(sigma, signed=True),
        "pes": PES(sigma, truncation),
        "truncated": Truncated(truncation),
    }


def cost(estimator: Any, num_steps: int, factor: float) -> float:
    """Of one whole-run estimate, in forward steps."""
    return float(_parts(estimator, num_steps) * estimator.cost(num_steps).in_steps(factor))


def _parts(estimator: Any, num_steps: int) -> int:
    """Estimates that a whole run takes."""
    return -(-num_steps // estimator.truncation) if isinstance(estimator, PES | Truncated) else 1


def as_weights(flat: list[float], like: Weights) -> Weights:
    """Weights of the structure of `like` from their numbers."""
    structure: Any
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([x.size for x in leaves])
    parts = np.split(np.asarray(flat, np.float32), ends[:-1])
    return structure.unflatten(
        [jnp.asarray(p.reshape(x.shape)) for p, x in zip(parts, leaves, strict=True)]
    )
