"""What a track costs, counted before anything runs: `python -m benchmarks.cost --track cifar10`.

Multiply-adds of the products in a training, in its metagradient and in the preset of `mgd`, and how long
they take at a rate that the machine is known for. Everything else a network does comes on top: on two
CPU cores a training runs at a third of the rate of large products.
"""

from __future__ import annotations

from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from jaxtyping import Array
from pydantic import BaseModel, ConfigDict
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.operations import multiply_adds
from poisonbench import attacks, tracks
from poisonbench.data import DataSpec
from poisonbench.errors import UserError
from poisonbench.metagradient import plan, state_bytes
from poisonbench.metagradient.programs import split
from poisonbench.metagradient.replay import DEFAULT_MEMORY
from poisonbench.victim.recipe import Recipe
from poisonbench.victim.training import TrainingRun, TrainingSet, TrainState

SHAPES = {"digits": (8, 8, 1), "tfds:cifar10": (32, 32, 3)}
CLASSES = 10


class Cost(BaseModel):
    """Multiply-adds.

    Attributes:
        steps: of a training.
        training: of one victim.
        forward: steps that a metagradient takes before it differentiates them, within its memory.
        metagradient: of one, its training included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    steps: int
    training: int
    forward: int
    metagradient: int


def cost(
    recipe: Recipe, images: int, shape: tuple[int, int, int], poisons: int, memory: str = DEFAULT_MEMORY
) -> Cost:
    """Count for one victim, from shapes alone.

    Args:
        recipe: the victim's.
        images: in the training set.
        shape: of an image; height, width, channels.
        poisons: images that carry a cotangent.
        memory: for the states that a metagradient keeps.
    """
    arrays = [
        jax.ShapeDtypeStruct((images, *shape), jnp.uint8),
        jax.ShapeDtypeStruct((images,), jnp.int32),
        jax.ShapeDtypeStruct((images,), jnp.int32),
        jax.ShapeDtypeStruct((poisons, *shape), jnp.float32),
    ]

    def start(images: Array, labels: Array, slot: Array) -> tuple[TrainingRun, TrainState]:
        data = TrainingSet(images, labels, slot, CLASSES)
        return TrainingRun.start(recipe, data, jax.random.split(jax.random.key(0), 1))

    def step(images: Array, labels: Array, slot: Array, z: Array) -> TrainState:
        run, state = start(images, labels, slot)
        return run(state, jnp.int32(0), z)

    def pull_back(images: Array, labels: Array, slot: Array, z: Array) -> Any:
        run, state = start(images, labels, slot)
        floating, join = split(state)
        once = jax.vjp(lambda x, z: split(run(join(x), jnp.int32(0), z))[0], floating, z)
        return once[1](floating)

    once, back = multiply_adds(step, *arrays), multiply_adds(pull_back, *arrays)
    steps = recipe.num_steps(images)
    state = state_bytes(jax.eval_shape(lambda *a: start(*a)[1], *arrays[:3]))
    forward = plan(steps, memory=memory, state_bytes=state).forward
    # What differentiates a step takes it once more.
    return Cost(
        steps=steps, training=once * steps, forward=forward, metagradient=once * forward + back * steps
    )


def size(spec: DataSpec) -> tuple[int, tuple[int, int, int]]:
    """Training images of a track's data set, and the shape of each."""
    height, width, channels = SHAPES[spec.name]
    if spec.resolution is not None:
        height = width = spec.resolution
    assert spec.train_size is not None  # as every track has it
    return spec.train_size, (height, width, channels)


def main(
    track: Annotated[str, typer.Option(help="Preset to count for.")] = "cifar10",
    rate: Annotated[
        float, typer.Option(min=1e-6, help="Floating-point operations per second, in 10¹².")
    ] = 30.0,
) -> None:
    """Print what the victims and the mgd preset of a track cost."""
    try:
        preset = tracks.load(track)
    except UserError as error:
        raise typer.BadParameter(str(error)) from None
    images, shape = size(preset.dataset)
    poisons = preset.budget.count(images)
    mgd: Any = attacks.build("mgd", list(preset.options("mgd", preset.budget.labels).items()))
    costs = {
        name: cost(recipe, images, shape, poisons, mgd.memory) for name, recipe in preset.recipes.items()
    }
    surrogate = costs[preset.surrogate]
    checks = mgd.checks * mgd.check_seeds
    gradients = mgd.steps * mgd.runs_per_step + mgd.start_seeds
    rows = {
        **{f"one training, {name}": c.training for name, c in costs.items()},
        f"one metagradient ({surrogate.forward:,} steps forward)": surrogate.metagradient,
        f"crafting: {gradients} metagradients, {checks} checks": gradients * surrogate.metagradient
        + checks * surrogate.training,
        f"evaluation: {2 * preset.seeds} victims of each recipe": 2
        * preset.seeds
        * sum(c.training for c in costs.values()),
    }
    table = Table(box=box.SIMPLE_HEAD, title=f"{track}: {surrogate.steps} steps of {preset.surrogate}")
    table.add_column("what")
    for column in ("multiply-adds", f"hours at {rate:g} TFLOP/s"):
        table.add_column(column, justify="right")
    for what, number in rows.items():
        table.add_row(what, f"{number:.3g}", f"{2 * number / rate / 1e12 / 3600:.3g}")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    typer.run(main)
