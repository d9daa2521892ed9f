"""VeLO: an optimizer that is itself a network, and has learnt to choose its own step sizes.

For each tensor of the optimizee an LSTM sees how far training has come, the loss and the tensor's
gradient statistics, and what the other tensors' LSTMs see at most; it puts out a step size λ and K
coefficients. Those mix K small MLPs into one, which sees the gradient and its running averages for a
single parameter (30 numbers) and puts out a direction d and a log magnitude u:

    p ← p - 10⁻³ λ √(mean p² + 1e-9) · d · exp(10⁻³ u)

Nothing is tuned but the length of the training, which has to be said in advance: everything is a
function of t / num_steps. Past num_steps nothing stops, and the weights have never seen such a t; those
who stated too short a length have found that it matters (Rezk et al., 2023,
https://arxiv.org/abs/2310.18191).

Cost per step: some 300 multiply-adds and 150 numbers of passing memory for each parameter, four numbers
of state; and an LSTM step for each tensor. Where the gradient itself costs little, that is most of it.

When not to use it: above some hundred million parameters or some hundred thousand steps, which it was
not trained for, and where the loss is not a loss (it is read for progress).

A part of the tensor input and one layer of the weights look like slips of the original (see
`_tensor_input` and `linear`); they are kept, since released weights were trained with them.

References:
    Metz et al., "VeLO: Training Versatile Learned Optimizers by Scaling Up", 2022,
    https://arxiv.org/abs/2211.09760.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    require_loss,
    require_num_steps,
    require_shapes,
    shaped_like,
    tensors,
)
from poisonbench.optimizers.initialise import Weights, linear, normal

MOMENTUM_DECAYS = (0.9, 0.99, 0.999)
SECOND_MOMENT_DECAYS = (0.999,)
FACTORED_DECAYS = (0.9, 0.99, 0.999)
FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
TIMESCALES = 10
SHORTEST = 10.0
TENSOR_INPUTS = 30
GROUPS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
"""Channels of each group of `moments.features`, which are as many pieces of the first layer."""
UNITS = 4
OUTPUTS = 3


class LossBuffer(NamedTuple):
    """Ten running means of the loss, over ten steps to all of them, and the least that each has been."""

    means: Array
    least: Array


class VeLOState(NamedTuple):
    """Everything that a step changes beside the parameters.

    Attributes:
        step: int32, updates so far.
        losses: of the whole optimizee.
        hidden, cell: `[tensors, H]`, of the LSTM.
        moments: of each tensor, in the order of `jax.tree.leaves`.
    """

    step: Array
    losses: LossBuffer
    hidden: Array
    cell: Array
    moments: tuple[moments.Moments, ...]


class Trace(NamedTuple):
    """What a step computed on its way, to be held against another implementation.

    Attributes:
        lstm_in: `[tensors, 30]`.
        controls: `[tensors, K]`.
        lr_mult: `[tensors]`, λ.
        loss_features: `[9]`.
        mlp_in: one of `[…, 30]` for each tensor.
        mlp_out: one of `[…, 3]`.
    """

    lstm_in: Array
    controls: Array
    lr_mult: Array
    loss_features: Array
    mlp_in: tuple[Array, ...]
    mlp_out: tuple[Array, ...]


@dataclass(frozen=True)
class VeLO:
    """The family of weights of these sizes.

    Attributes:
        hidden: H, of the LSTM; 512 in the released weights.
        bank: K, MLPs in the bank; 256 in the released ones.
        bank_scale: the mixture of MLPs is `bank_scale / K` times their sum; 100 in the released ones.
            With a small bank that makes every step violent.
    """

    name: ClassVar[str] = "velo"
    hidden: int = 512
    bank: int = 256
    bank_scale: float = 100.0

    def __post_init__(self) -> None:
        if min(self.hidden, self.bank) < 1 or not self.bank_scale > 0:
            raise UserError("velo: hidden, bank and bank_scale must be above 0")

    def shapes(self) -> dict[str, Any]:
        """The shape of every array, nested as in the released files."""
        h, k = self.hidden, self.bank

        def layer(inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
            return {"w": (inputs, outputs), "b": (outputs,)}

        stack: dict[str, tuple[int, ...]] = {f"w0__{i}": (k, n, UNITS) for i, n in enumerate(GROUPS)}
        stack |= {"b0": (k, UNITS), "w1": (k, UNITS, UNITS), "b1": (k, UNITS)}
        stack |= {"w2": (k, UNITS, OUTPUTS), "b2": (k, OUTPUTS)}
        return {
            "lstm_init_state": {"hidden": (1, h), "cell": (1, h)},
            "rnn_params": {
                # Its output was never used; it is here since the files have it.
                "linear": layer(TENSOR_INPUTS, h),
                "linear_1": layer(TENSOR_INPUTS, h),
                "linear_2": layer(TENSOR_INPUTS, h),
                "rnn/linear": layer(2 * h, 4 * h),
                "rnn_to_controls": layer(h, k),
                "step_size": layer(h, 1),
            },
            "ff_mod_stack": {"~": stack},
        }

    def init(self, key: PRNGKeyArray) -> Weights:
        """Weights before any meta-training: truncated normals by fan-in, zero biases and states."""
        lstm_key, bank_key = jax.random.split(key)
        shapes = self.shapes()
        rnn = shapes["rnn_params"]
        layers = {
            name: linear(jax.random.fold_in(lstm_key, i), *rnn[name]["w"])
            for i, name in enumerate(sorted(rnn))
        }
        stack = {}
        for i, (name, shape) in enumerate(sorted(shapes["ff_mod_stack"]["~"].items())):
            fan_in = sum(GROUPS) if name.startswith("w0") else UNITS
            drawn = normal(jax.random.fold_in(bank_key, i), shape, fan_in)
            stack[name] = drawn if name.startswith("w") else jnp.zeros(shape)
        states = {name: jnp.zeros(shape) for name, shape in shapes["lstm_init_state"].items()}
        return {"lstm_init_state": states, "rnn_params": layers, "ff_mod_stack": {"~": stack}}

    def transformation(
        self, num_steps: int | Array, weights: Weights
    ) -> optax.GradientTransformationExtraArgs:
        """See `velo`."""
        return velo(num_steps, weights, bank_scale=self.bank_scale)

    @staticmethod
    def of(weights: object, bank_scale: float = 100.0) -> VeLO:
        """The family that weights belong to, read off their shapes.

        Raises:
            UserError: they are not VeLO's, or do not fit together.
        """
        try:
            hidden, bank = weights["rnn_params"]["rnn_to_controls"]["w"].shape  # type: ignore[index]
        except (TypeError, KeyError, IndexError, AttributeError, ValueError):
            raise UserError(
                "these are no weights of velo: they have no rnn_params/rnn_to_controls/w of two axes"
            ) from None
        family = VeLO(hidden, bank, bank_scale)
        require_shapes(weights, family.shapes(), "velo")
        return family


def velo(
    num_steps: int | Array, weights: Weights, *, bank_scale: float = 100.0
) -> optax.GradientTransformationExtraArgs:
    """VeLO with these weights, for a training of that many steps.

    Args:
        num_steps: length of the whole training; may be traced.
        weights: the nested dictionary of the released files (see `load_weights`), float32.
        bank_scale: as it was when they were trained.

    Returns:
        An optimizer whose `update(gradients, state, params, value=loss)` wants the parameters and the
        loss that the gradients are of. Gradients are cut to ±1000 element by element; a NaN among them,
        or in the loss, reaches every parameter. Pure, and differentiable in everything.

    Raises:
        UserError: no or a wrong `num_steps`; weights that do not fit together; from `init` and
            `update`, empty trees, leaves that are not float32 (or all float64), no loss.
    """
    require_num_steps(num_steps)
    VeLO.of(weights, bank_scale)

    def init(params: PyTree) -> VeLOState:
        leaves = tensors(params, "parameters")
        start = weights["lstm_init_state"]
        size = (len(leaves), start["hidden"].shape[1])
        dtype = leaves[0].dtype
        return VeLOState(
            jnp.zeros((), jnp.int32),
            LossBuffer(jnp.zeros(TIMESCALES, dtype), jnp.full(TIMESCALES, 1e12, dtype)),
            jnp.broadcast_to(start["hidden"], size).astype(dtype),
            jnp.broadcast_to(start["cell"], size).astype(dtype),
            tuple(moments.zeros(leaf, _decays(dtype)) for leaf in leaves),
        )

    def update(
        updates: PyTree, state: VeLOState, params: PyTree = None, *, value: Any = None, **_: Any
    ) -> tuple[PyTree, VeLOState]:
        return step(num_steps, weights, bank_scale, updates, state, params, value)[:2]

    return optax.GradientTransformationExtraArgs(init, update)


def step(
    num_steps: int | Array,
    weights: Weights,
    bank_scale: float,
    gradients: PyTree,
    state: VeLOState,
    params: PyTree,
    value: Any,
) -> tuple[PyTree, VeLOState, Trace]:
    """One update, with what was computed on the way; arguments as in `velo`."""
    p = tensors(params, "parameters")
    clipped = cut(tensors(gradients, "gradients", p))
    loss = require_loss(value, p[0].dtype)

    losses, loss_features = _observe(state.losses, loss, state.step, num_steps)
    progress = jnp.tanh(10 * (state.step / num_steps - jnp.array(FRACTIONS))).astype(p[0].dtype)
    rows = zip(state.moments, p, strict=True)
    lstm_in = jnp.stack([_tensor_input(progress, loss_features, m, x) for m, x in rows])
    hidden, cell = _lstm(weights["rnn_params"], lstm_in, state.hidden, state.cell)
    controls = _apply(weights["rnn_params"]["rnn_to_controls"], hidden)
    lr_mult = _apply(weights["rnn_params"]["step_size"], hidden)[:, 0]

    averages = [
        moments.update(m, g, _decays(g.dtype)) for m, g in zip(state.moments, clipped, strict=True)
    ]
    mlp_in, mlp_out, steps = [], [], []
    for i, (m, g, x) in enumerate(zip(averages, clipped, p, strict=True)):
        groups = moments.features(m, g, x).values()
        inputs = moments.normalised(jnp.concatenate(list(groups), -1))
        outputs = _mlp(_mixed(weights["ff_mod_stack"]["~"], controls[i], bank_scale), inputs)
        scale = lr_mult[i] * jnp.sqrt(jnp.mean(x**2) + 1e-9)
        steps.append(-1e-3 * scale * outputs[..., 0] * jnp.exp(1e-3 * outputs[..., 1]))
        mlp_in.append(inputs)
        mlp_out.append(outputs)

    new = VeLOState(state.step + 1, losses, hidden, cell, tuple(averages))
    trace = Trace(lstm_in, controls, lr_mult, loss_features, tuple(mlp_in), tuple(mlp_out))
    return shaped_like(params, steps), new, trace


def loss_decays(num_steps: int | Array) -> Float[Array, " 10"]:
    """Of the running means of the loss: timescales lie evenly, by ratio, from 10 to `num_steps`."""
    exponents = jnp.linspace(0.0, 1.0, TIMESCALES)
    longest = jnp.asarray(num_steps, jnp.result_type(float))
    return jnp.exp(-1 / (SHORTEST * (longest / SHORTEST) ** exponents))


def _observe(
    buffer: LossBuffer, loss: Float[Array, ""], t: Array, num_steps: int | Array
) -> tuple[LossBuffer, Float[Array, " 9"]]:
    """Take note of a loss, and say how much it has fallen from each timescale to the next."""
    decays = loss_decays(num_steps).astype(loss.dtype)
    unbias = 1 - decays ** (t + 1)
    largest = jnp.where(t == 0, loss, jnp.max(buffer.means / unbias))
    # A loss that shoots up would drown what the means remember.
    loss = jnp.minimum(loss, 2 * jnp.abs(largest))
    means = decays * buffer.means + (1 - decays) * loss
    current = means / unbias
    least = jnp.minimum(buffer.least, current)
    ratio = (current[:-1] - least[:-1]) / jnp.maximum(1e-8, current[1:] - least[:-1])
    features = jnp.where(t < 2, 0.0, jnp.clip(ratio - 1, -1, 1))
    return LossBuffer(means, least), features


def _tensor_input(
    progress: Float[Array, " 9"],
    loss_features: Float[Array, " 9"],
    old: moments.Moments,
    tensor: Float[Array, "..."],
) -> Float[Array, " 30"]:
    """What the LSTM sees of one tensor: the averages before this gradient, relative to its size.

    The variance of the second moment is taken about the mean of the first, once for each decay: so
    were the released weights trained.
    """
    axes = tuple(range(tensor.ndim))
    size = jax.lax.rsqrt(jnp.maximum(1e-9, jnp.mean(tensor**2)))
    m, v = size * old.m, size * old.v
    mean = m.mean(axes, keepdims=True)
    rank = sum(n > 1 for n in tensor.shape)
    return jnp.concatenate([
        progress,
        loss_features,
        _log(v.mean(axes)),
        jax.nn.one_hot(rank, 5, dtype=tensor.dtype),
        _log(m.var(axes)),
        _log(((v - mean) ** 2).mean(axes)),
    ])  # fmt: skip


def _lstm(
    layers: Mapping[str, Weights],
    x: Float[Array, "n 30"],
    h: Float[Array, "n H"],
    c: Float[Array, "n H"],
) -> tuple[Float[Array, "n H"], Float[Array, "n H"]]:
    """A step of the LSTM of every tensor, each of which sees the largest of all mixed inputs."""
    shared = jax.nn.relu(_apply(layers["linear_1"], x)).max(0)
    inputs = _apply(layers["linear_2"], x) + shared[None]
    gates = _apply(layers["rnn/linear"], jnp.concatenate([inputs, h], 1))
    i, g, f, o = jnp.split(gates, 4, axis=1)
    c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _mixed(bank: Weights, controls: Float[Array, " K"], bank_scale: float) -> dict[str, Array]:
    """One MLP out of the bank: every weight and bias `bank_scale / K · Σ c_k W_k`."""
    first = jnp.concatenate([bank[f"w0__{i}"] for i in range(len(GROUPS))], axis=1)
    layers = {"w0": first, **{name: bank[name] for name in ("b0", "w1", "b1", "w2", "b2")}}
    factor = bank_scale / len(controls)
    return {name: factor * jnp.tensordot(controls, layer, 1) for name, layer in layers.items()}


def _mlp(layers: Mapping[str, Array], x: Float[Array, "... 30"]) -> Float[Array, "... 3"]:
    shape = x.shape[:-1]
    x = x.reshape(-1, x.shape[-1])
    x = jax.nn.relu(x @ layers["w0"] + layers["b0"][None])
    x = jax.nn.relu(x @ layers["w1"] + layers["b1"][None])
    return (x @ layers["w2"] + layers["b2"][None]).reshape(*shape, -1)


def _apply(layer: Weights, x: Float[Array, "n inputs"]) -> Float[Array, "n outputs"]:
    return x @ layer["w"] + layer["b"][None]


def _log(x: Float[Array, " n"]) -> Float[Array, " n"]:
    return 0.5 * jnp.clip(jnp.log(1e-8 + jnp.abs(10 * x)), -5, 5)


def _decays(dtype: Any) -> moments.Decays:
    each = (MOMENTUM_DECAYS, SECOND_MOMENT_DECAYS, FACTORED_DECAYS)
    return moments.Decays(*(jnp.array(decays, dtype) for decays in each))
