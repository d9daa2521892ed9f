"""A learned optimizer and a task so small that their meta-loss is known in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


@dataclass(frozen=True)
class LearnedRate:
    """SGD whose learning rate is `exp(θ)`, one for every tensor."""

    start: float = -2.0
    name: str = "toy"

    def init(self, key: Any) -> dict[str, Any]:
        return {"log_rate": jnp.full(1, self.start) + 0.01 * jax.random.normal(key, (1,))}

    def transformation(self, num_steps: Any, weights: Any) -> optax.GradientTransformationExtraArgs:
        def update(grads: Any, state: Any, params: Any = None, *, value: Any, **_: Any) -> Any:
            rate = jnp.exp(weights["log_rate"][0])
            return jax.tree.map(lambda g: -rate * g, grads), state

        return optax.GradientTransformationExtraArgs(lambda params: (), update)


@dataclass(frozen=True)
class LearnedMomentum:
    """SGD with momentum whose first momentum is learnt, as the first recurrent state of VeLO is."""

    name: str = "toy-momentum"

    def init(self, key: Any) -> dict[str, Any]:
        return {"first": 0.1 * jax.random.normal(key, ()), "rate": jnp.float32(-2.0)}

    def transformation(self, num_steps: Any, weights: Any) -> optax.GradientTransformationExtraArgs:
        def init(params: Any) -> Any:
            return jax.tree.map(lambda p: jnp.full_like(p, 1) * weights["first"], params)

        def update(grads: Any, state: Any, params: Any = None, *, value: Any, **_: Any) -> Any:
            state = jax.tree.map(lambda m, g: 0.8 * m + g, state, grads)
            rate = jnp.exp(weights["rate"]) / (1 + 0.01 * num_steps)
            return jax.tree.map(lambda m: -rate * m * (1 + 0.1 * jnp.tanh(value)), state), state

        return optax.GradientTransformationExtraArgs(init, update)


@dataclass(frozen=True)
class Parabola:
    """`½ a x²` from `x = 1` on; `spread` makes each key start elsewhere."""

    curvature: float = 1.0
    spread: float = 0.0
    name: str = "parabola"

    def init(self, key: Any) -> dict[str, Any]:
        return {"x": 1.0 + self.spread * jax.random.normal(key, (1,))}

    def loss(self, params: Any, batch: Any) -> Any:
        return 0.5 * self.curvature * ((params["x"] - self.spread * batch) ** 2).mean()

    def value_and_grad(self, params: Any, batch: Any) -> Any:
        return jax.value_and_grad(self.loss)(params, batch)

    def batch(self, data: Any, key: Any) -> Any:
        return data[jax.random.randint(key, (), 0, len(data))]

    def normalised(self, loss: Any) -> Any:
        return loss


DATA = jnp.array([-1.0, 0.0, 1.0])


def loss_of_rate(
    theta: np.ndarray, num_steps: int, objective: str, curvature: float = 1.0
) -> np.ndarray:
    """The meta-loss of `LearnedRate` on a `Parabola` without spread, in closed form."""
    shrink = (1 - np.exp(theta) * curvature) ** 2
    if objective == "final":
        return 0.5 * curvature * shrink**num_steps
    return 0.5 * curvature * np.mean([shrink**t for t in range(num_steps)], axis=0)


def smoothed_slope(theta: float, sigma: float, num_steps: int, objective: str) -> float:
    """Derivative of `E L(θ+ε)` by quadrature."""
    nodes, masses = np.polynomial.hermite_e.hermegauss(61)
    values = loss_of_rate(theta + sigma * nodes, num_steps, objective)
    return float((masses * nodes * values).sum() / masses.sum() / sigma)
