"""The same training in PyTorch, and its metagradient by double backward.

ResNet-9 by the smooth recipe, written functionally on tensors, with PyTorch's own convolution,
pooling, GELU and cross-entropy, and every step's gradient taken with `create_graph=True`. It starts
from the same weights, batch order and poison as ours; the two gradients are compared.

- `torch`: the graph of the whole run is kept and differentiated once.
- `torch-checkpoint`: the states are kept; going backwards, each step is run again with a graph of its
  own and differentiated. This is what one writes when the first does not fit in memory.

`torch.compile` is left out: it does not differentiate twice. Batch normalisation is written out,
since `F.batch_norm` tracks its statistics outside the graph, where the objective needs their derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.problems import Problem
from poisonbench.errors import UserError
from poisonbench.stored import hardware
from poisonbench.victim.optimizer import learning_rate_schedule
from poisonbench.victim.recipe import Recipe

SHORT = 3
State = dict[str, Tensor]
"""Every array of the training by name: `params/…`, `stats/…` and `velocity/…`."""


def prepare(name: str, problem: Problem) -> Callable[[], tuple[float, np.ndarray]]:
    """What runs `torch` or `torch-checkpoint` on a problem."""
    if problem.setting.kind != "resnet9":
        raise UserError("the training in PyTorch is that of ResNet-9: choose --problem 8x8 or 16x16")
    training = TorchTraining(problem)
    whole = {"torch": training.whole_graph, "torch-checkpoint": training.step_by_step}[name]

    def run() -> tuple[float, np.ndarray]:
        value, gradient = whole()
        return float(value), gradient.numpy().transpose(0, 2, 3, 1)

    return run


def memory_needed(
    name: str, problem: Problem, peak: Callable[..., tuple[int | None, Any]]
) -> int | None:
    """About how many bytes a whole run takes: two short runs, and a line through them.

    Args:
        name: `torch` or `torch-checkpoint`.
        problem: the whole run.
        peak: bytes that a call takes, and its result.
    """
    found = []
    for steps in (SHORT, 2 * SHORT):
        training = TorchTraining(problem)
        training.num_steps = min(steps, problem.num_steps)
        whole = training.whole_graph if name == "torch" else training.step_by_step
        whole()
        found.append(peak(whole)[0])
    if found[0] is None or found[1] is None:
        return None
    return found[1] + (found[1] - found[0]) * max(0, problem.num_steps - 2 * SHORT) // SHORT


class TorchTraining:
    """The run of a `Problem` in tensors; images are `[n, channels, height, width]`.

    Attributes:
        state: before step 0.
        z: `[p, channels, height, width]`, poisoned pixels in [0, 1].
    """

    def __init__(self, problem: Problem) -> None:
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(hardware().cores)
        run, objective = problem.step, problem.objective
        self.recipe: Recipe = run.recipe
        self.num_steps = problem.num_steps
        self.images = _images(run.data.images)
        self.labels = torch.tensor(np.asarray(run.data.labels)).long()
        self.slot = torch.tensor(np.asarray(run.data.slot)).long()
        self.order = torch.tensor(np.asarray(run.order[0])).long()
        self.held_out = _images(objective.images)
        self.held_out_labels = torch.tensor(np.asarray(objective.labels)).long()
        schedule = learning_rate_schedule(self.recipe, run.num_steps)
        self.rates = [float(schedule(t)) for t in range(self.num_steps)]
        self.state = _state(problem.state)
        self.z = _images(problem.z, scale=1)
        self.momentum = float(dict(self.recipe.optimizer_options)["momentum"])

    def train(self) -> Tensor:
        """The training alone, with the objective's value at its end."""
        state = self.state
        for t in range(self.num_steps):
            state = {name: x.detach() for name, x in self.step(state, t, self.z, graph=False).items()}
        with torch.no_grad():
            return self.objective(state)

    def whole_graph(self) -> tuple[Tensor, Tensor]:
        """One graph of the whole run, differentiated once."""
        z = self.z.clone().requires_grad_()
        state = self.state
        for t in range(self.num_steps):
            state = self.step(state, t, z, graph=True)
        value = self.objective(state)
        return value.detach(), torch.autograd.grad(value, z)[0]

    def step_by_step(self) -> tuple[Tensor, Tensor]:
        """Every state kept; each step run again, and differentiated by itself, last to first."""
        states = [self.state]
        for t in range(self.num_steps):
            after = self.step(states[-1], t, self.z, graph=False)
            states.append({name: x.detach() for name, x in after.items()})
        final = {name: x.requires_grad_() for name, x in states.pop().items()}
        value = self.objective(final)
        adjoint = _gradients(value, list(final.values()), None)
        gradient = torch.zeros_like(self.z)
        for t in reversed(range(self.num_steps)):
            before = {name: x.detach().requires_grad_() for name, x in states.pop().items()}
            z = self.z.clone().requires_grad_()
            after = self.step(before, t, z, graph=True)
            found = _gradients(list(after.values()), [*before.values(), z], adjoint)
            adjoint, gradient = found[:-1], gradient + found[-1]
        return value.detach(), gradient

    def step(self, state: State, t: int, z: Tensor, *, graph: bool) -> State:
        """One update; differentiable in `state` and `z` where `graph`."""
        rows = self.order[t]
        slot = self.slot[rows]
        poisoned = (slot >= 0)[:, None, None, None]
        images = torch.where(poisoned, z[slot.clamp(min=0)], self.images[rows])
        names = [name for name in state if name.startswith("params/")]
        if not graph:
            state = {name: x.detach().requires_grad_(name in names) for name, x in state.items()}
        elif not state[names[0]].requires_grad:  # the first state of a whole graph
            state = {name: x.clone().requires_grad_(name in names) for name, x in state.items()}
        logits, stats = self.network(state, images, train=True)
        loss = F.cross_entropy(logits, self.labels[rows])
        inner = torch.autograd.grad(loss, [state[name] for name in names], create_graph=graph)
        after = dict(stats)
        for name, gradient in zip(names, inner, strict=True):
            weights = state[name]
            if weights.ndim > 1:
                gradient = gradient + self.recipe.weight_decay * weights  # noqa: PLW2901
            key = name.replace("params/", "velocity/")
            after[key] = gradient + self.momentum * state[key]
            after[name] = weights - self.rates[t] * after[key]
        return {name: after[name] for name in state}

    def objective(self, state: State) -> Tensor:
        """Mean cross-entropy on the held-out images."""
        return F.cross_entropy(self.network(state, self.held_out, train=False)[0], self.held_out_labels)

    def network(self, state: State, images: Tensor, *, train: bool) -> tuple[Tensor, State]:
        """Logits, and the tracked statistics after this batch."""
        stats: State = {}

        def block(x: Tensor, name: str, *, pool: bool = False) -> Tensor:
            x = F.conv2d(x, state[f"params/{name}/kernel"], padding=1)
            x = F.gelu(self._normalised(x, name, state, stats, train), approximate="tanh")
            return F.avg_pool2d(x, 2) if pool else x

        x = (images - self.recipe.input_mean) / self.recipe.input_std
        x = block(block(x, "stem"), "stage1", pool=True)
        x = x + block(block(x, "residual1/0"), "residual1/1")
        x = block(block(x, "stage2", pool=True), "stage3", pool=True)
        x = x + block(block(x, "residual3/0"), "residual3/1")
        x = x.mean((2, 3)) @ state["params/classifier/kernel"] + state["params/classifier/bias"]
        return x * self.recipe.final_scale, stats

    def _normalised(self, x: Tensor, name: str, state: State, stats: State, train: bool) -> Tensor:
        mean_name, variance_name = f"stats/{name}/norm/mean", f"stats/{name}/norm/variance"
        mean, variance = state[mean_name], state[variance_name]
        if train:
            keep = self.recipe.norm_momentum
            old_mean, old_variance = mean, variance
            variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            stats[mean_name] = keep * old_mean + (1 - keep) * mean
            stats[variance_name] = keep * old_variance + (1 - keep) * variance
        factor = state[f"params/{name}/norm/scale"] * torch.rsqrt(variance + self.recipe.norm_epsilon)
        shift = state[f"params/{name}/norm/bias"]
        return (x - mean[:, None, None]) * factor[:, None, None] + shift[:, None, None]


def _gradients(outputs: Any, inputs: list[Tensor], cotangents: list[Tensor] | None) -> list[Tensor]:
    return list(
        torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, materialize_grads=True)
    )


def _images(images: Any, scale: float = 255) -> Tensor:
    """From `[n, height, width, channels]` in levels up to `scale`."""
    return torch.tensor(np.asarray(images, np.float32).transpose(0, 3, 1, 2) / np.float32(scale))


def _state(state: Any) -> State:
    """Our state of one seed by name, kernels of convolutions as `[out, in, 3, 3]`."""
    found: State = {}
    parts = {"params": state.params, "stats": state.stats}
    for path, array in jax.tree_util.tree_flatten_with_path(parts)[0]:
        name = "/".join(str(key.key) for key in path)
        values = np.asarray(array)[0]
        if values.ndim == 4:
            values = values.transpose(3, 2, 0, 1)
        found[name] = torch.tensor(values.copy())
    for name in [name for name in found if name.startswith("params/")]:
        found[name.replace("params/", "velocity/")] = torch.zeros_like(found[name])
    return found
