"""The small MLP optimizer: the same network for every parameter, and nothing else.

What VeLO's per-parameter network sees, less two clipped or redundant channels, and eleven functions of
the step count, go through one MLP of 39-4-4-2 with outputs d and u:

    p ← p - 10⁻³ · d · exp(10⁻³ u)

The decays of the running averages are learnt too, `1 - (1 - β₀) e^{10 w}`. It knows neither how long the
training will be nor the loss, and steps do not scale with the tensor: cheap, and less able than VeLO.

Cost per step: some 200 multiply-adds for each parameter. Some 200 weights, so that evolution
strategies have an easy time.

References:
    Metz et al., "Practical tradeoffs between memory, compute, and performance in learned optimizers",
    2022, https://arxiv.org/abs/2203.11860.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from poisonbench.errors import UserError
from poisonbench.optimizers import moments
from poisonbench.optimizers.checks import (
    PyTree,
    cut,
    require_num_steps,
    require_shapes,
    shaped_like,
    tensors,
)
from poisonbench.optimizers.initialise import Weights, linear
from poisonbench.optimizers.velo import (
    FACTORED_DECAYS,
    MOMENTUM_DECAYS,
    SECOND_MOMENT_DECAYS,
)

TIMESCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)
UNSEEN = ("clipped", "rms_normalised")
CHANNELS = 28
DECAYS = {
    "momentum": MOMENTUM_DECAYS,
    "second_moment": SECOND_MOMENT_DECAYS,
    "factored": FACTORED_DECAYS,
}


class MLPState(NamedTuple):
    """Updates so far (int32), and the moments of each tensor in the order of `jax.tree.leaves`."""

    step: Array
    moments: tuple[moments.Moments, ...]


@dataclass(frozen=True)
class MLPOptimizer:
    """The family of weights of this size.

    Attributes:
        hidden: units in each of the two hidden layers.
    """

    name: ClassVar[str] = "mlp_opt"
    hidden: int = 4

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise UserError("mlp_opt: hidden must be above 0")

    def shapes(self) -> dict[str, Any]:
        """The shape of every array."""
        sizes = (CHANNELS + len(TIMESCALES), self.hidden, self.hidden, 2)
        layers = {
            f"layer_{i}": {"w": (a, b), "b": (b,)}
            for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))
        }
        return {"decays": {name: (len(d),) for name, d in DECAYS.items()}, "mlp": layers}

    def init(self, key: PRNGKeyArray) -> Weights:
        """Weights before any meta-training: truncated normals by fan-in, zero biases, usual decays."""
        shapes = self.shapes()
        layers = {
            name: linear(jax.random.fold_in(key, i), *shapes["mlp"][name]["w"])
            for i, name in enumerate(shapes["mlp"])
        }
        return {"decays": {name: jnp.zeros(s) for name, s in shapes["decays"].items()}, "mlp": layers}

    def transformation(
        self, num_steps: int | Array, weights: Weights
    ) -> optax.GradientTransformationExtraArgs:
        """See `mlp_opt`."""
        return mlp_opt(num_steps, weights)

    @staticmethod
    def of(weights: object) -> MLPOptimizer:
        """The family that weights belong to, read off their shapes.

        Raises:
            UserError: they are not this optimizer's, or do not fit together.
        """
        try:
            (hidden,) = weights["mlp"]["layer_0"]["b"].shape  # type: ignore[index]
        except (TypeError, KeyError, IndexError, AttributeError, ValueError):
            raise UserError("these are no weights of mlp_opt: they have no mlp/layer_0/b") from None
        family = MLPOptimizer(hidden)
        require_shapes(weights, family.shapes(), "mlp_opt")
        return family


def mlp_opt(num_steps: int | Array, weights: Weights) -> optax.GradientTransformationExtraArgs:
    """The small MLP optimizer with these weights.

    Args:
        num_steps: length of the whole training, which this optimizer does not look at; asked for so
            that all learned optimizers are called alike.
        weights: as `MLPOptimizer.init` makes them, float32.

    Returns:
        An optimizer whose `update(gradients, state, params)` wants the parameters. A `value` is taken
        and not read.

    Raises:
        UserError: no or a wrong `num_steps`; weights that do not fit together; from `init` and
            `update`, empty trees, or leaves that are not float32 (or all float64).
    """
    require_num_steps(num_steps)
    MLPOptimizer.of(weights)

    def init(params: PyTree) -> MLPState:
        leaves = tensors(params, "parameters")
        decays = _decays(weights, leaves[0].dtype)
        return MLPState(jnp.zeros((), jnp.int32), tuple(moments.zeros(x, decays) for x in leaves))

    def update(
        updates: PyTree, state: MLPState, params: PyTree = None, **_: Any
    ) -> tuple[PyTree, MLPState]:
        p = tensors(params, "parameters")
        clipped = cut(tensors(updates, "gradients", p))
        decays = _decays(weights, p[0].dtype)
        averages = [moments.update(m, g, decays) for m, g in zip(state.moments, clipped, strict=True)]
        time = jnp.tanh(state.step / jnp.array(TIMESCALES, p[0].dtype) - 1)
        steps = [
            _step(weights["mlp"], time, m, g, x) for m, g, x in zip(averages, clipped, p, strict=True)
        ]
        return shaped_like(params, steps), MLPState(state.step + 1, tuple(averages))

    return optax.GradientTransformationExtraArgs(init, update)


def _step(
    layers: Weights,
    time: Float[Array, " 11"],
    averages: moments.Moments,
    gradient: Float[Array, "..."],
    tensor: Float[Array, "..."],
) -> Float[Array, "..."]:
    groups = moments.features(averages, gradient, tensor)
    seen = jnp.concatenate([channels for name, channels in groups.items() if name not in UNSEEN], -1)
    x = moments.normalised(seen).reshape(-1, CHANNELS)
    first, second, last = (layers[f"layer_{i}"] for i in range(3))
    # Time is the same for all parameters: its share of the first layer is computed once.
    constant = time @ first["w"][CHANNELS:] + first["b"]
    x = jax.nn.relu(x @ first["w"][:CHANNELS] + constant[None])
    x = jax.nn.relu(x @ second["w"] + second["b"][None])
    direction, magnitude = (x @ last["w"] + last["b"][None]).T
    return (-1e-3 * direction * jnp.exp(1e-3 * magnitude)).reshape(tensor.shape)


def _decays(weights: Weights, dtype: Any) -> moments.Decays:
    """The learnt decays; those that would leave [0, 1] are held at its ends."""
    return moments.Decays(
        *(
            jnp.clip(
                1 - (1 - jnp.array(DECAYS[name], dtype)) * jnp.exp(10 * weights["decays"][name]), 0, 1
            )
            for name in DECAYS
        )
    )
