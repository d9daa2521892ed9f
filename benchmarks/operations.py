"""How many multiply-adds a training step and its derivative need: the floor of every way.

Counted in the traced program, dead code removed, over matrix products and convolutions alone; all
else is of lower order. With F for the forward pass, a layer `y = x W` costs F forward and 2F backward
(`dx = dy Wᵀ`, `dW = xᵀ dy`), so a step is 3F. Pulling an adjoint through these three products takes two
products for each, 6F, and what they are pulled through, `y` and `dx`, has to be there: 2F when the
step is run again. The vector-Jacobian product of a step is thus 8F, 8/3 of a step, and a metagradient
that keeps every state and runs every step again is 1 + 8/3 = 3.67 times the training; a little less,
since nobody asks for the derivative by the clean pixels. With y and dx kept as well it would be 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval
from jaxtyping import Array
from pydantic import BaseModel, ConfigDict

from benchmarks.problems import Problem
from poisonbench.metagradient.programs import split

PyTree = Any


class Operations(BaseModel):
    """Multiply-adds of one step, for each of the things that can be done with it.

    Attributes:
        forward: logits of one training batch.
        step: the training step.
        vjp: the vector-Jacobian product of the step, the step run again included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    forward: int
    step: int
    vjp: int

    @property
    def floor(self) -> float:
        """A metagradient over its training, every state kept and every step run again."""
        return 1 + self.vjp / self.step


def count(problem: Problem) -> Operations:
    """Count the step of a problem; the forward pass is that of the network in the step."""
    step, t = problem.step, jnp.int32(0)
    floating, join = split(problem.state)

    def pull_back(floating: list[Array], z: Array, adjoint: list[Array]) -> Any:
        return jax.vjp(lambda x, z: split(step(join(x), t, z))[0], floating, z)[1](adjoint)

    whole = multiply_adds(lambda s, z: step(s, t, z), problem.state, problem.z)
    back = multiply_adds(pull_back, floating, problem.z, floating)
    return Operations(forward=_forward(problem), step=whole, vjp=back)


def _forward(problem: Problem) -> int:
    # The tracked statistics and the loss depend on the forward pass alone; of the state after the
    # step, only the statistics are asked for. Where there are none, the layers are counted by hand.
    if problem.setting.kind != "resnet9":
        return problem.setting.batch_size * sum(
            math.prod(x.shape) for x in jax.tree.leaves(problem.state["params"]) if x.ndim == 2
        )
    stats = multiply_adds(lambda s, z: problem.step(s, jnp.int32(0), z).stats, problem.state, problem.z)
    kernel = problem.state.params["classifier"]["kernel"]
    return stats + problem.setting.batch_size * math.prod(kernel.shape)


def multiply_adds(function: Callable[..., PyTree], *arguments: PyTree) -> int:
    """Multiply-adds of the matrix products and convolutions that a function's results depend on."""
    return in_program(jax.make_jaxpr(function)(*arguments))


def in_program(closed: Any, turns: int | None = None) -> int:
    """The same of a traced program, whose while loops, if it has any, make so many turns each.

    Raises:
        ValueError: there are products in a while loop, and nobody says how often it turns.
    """
    return _in_program(closed.jaxpr, turns)


def _in_program(jaxpr: Any, turns: int | None) -> int:
    # At each level anew: what is dead in the body of a while loop is not seen from outside of it.
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return sum(_in_equation(equation, turns) for equation in live.eqns)


def _in_equation(equation: Any, turns: int | None) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
    if name == "conv_general_dilated":
        numbers = parameters["dimension_numbers"]
        kernel = equation.invars[1].aval.shape
        per_output = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        return math.prod(equation.outvars[0].aval.shape) * per_output
    inner = [
        getattr(x, "jaxpr", x) for x in jax.tree.leaves(list(parameters.values()), is_leaf=_is_program)
    ]
    found = sum(_in_program(x, turns) for x in inner if hasattr(x, "eqns"))
    if name == "while" and found:
        if turns is None:
            raise ValueError("a step with products in a while loop cannot be counted")
        return found * turns
    return found * int(parameters["length"]) if name == "scan" else found


def _is_program(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")
