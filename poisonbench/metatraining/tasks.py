"""Inner tasks: the small trainings that an optimizer learns on, and is judged on.

A task is a network, its data and a batch size; everything that fixes the compiled program is a field,
so that a task can be a static argument. Three families: perceptrons and small convolutional networks
that classify, and auto-encoders. `draw` gives tasks of the training distribution; its ranges are those
of VeLO's first phase as far as two cores go. Values are compared across tasks by the normalisation of
VeLO's meta-training: for C classes `(clip(L, 0, ln 2C) - ln(C / 5)) · 10 / ln C`, a loss that is not a
number counting as ln 2C, and for auto-encoders `clip(ln(L + 1e-8), -12, 1) / 2 + 10`.

References:
    Metz et al., "VeLO: Training Versatile Learned Optimizers by Scaling Up", 2022,
    https://arxiv.org/abs/2211.09760.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from poisonbench.errors import UserError
from poisonbench.metatraining import images
from poisonbench.metatraining.images import TaskData
from poisonbench.victim.convolution import convolve, for_backend

Family = Literal["mlp", "conv", "autoencoder"]
Activation = Literal["relu", "tanh", "gelu"]
Params = dict[str, Any]

FAMILIES: tuple[Family, ...] = get_args(Family)
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
DATASETS = ("digits", "teacher")
WIDTHS: dict[Family, tuple[int, int]] = {"mlp": (8, 64), "conv": (4, 12), "autoencoder": (8, 64)}
DEPTHS: dict[Family, tuple[int, int]] = {"mlp": (0, 3), "conv": (1, 3), "autoencoder": (0, 2)}
BATCHES = (8, 128)
RESOLUTIONS = (4, 8)
TEACHERS = 1000
"""Training tasks draw the seed of their synthetic data below this; held-out tasks take others."""


class Batch(NamedTuple):
    """Some images, `[batch_size, resolution, resolution, channels]`, and their labels."""

    images: Array
    labels: Array


@runtime_checkable
class Task(Protocol):
    """What meta-training and evaluation ask of a task; hashable, so it can be a static argument."""

    @property
    def name(self) -> str:
        """Tells it from other tasks, and can name a file."""

    def init(self, key: PRNGKeyArray) -> Any:
        """Fresh parameters."""

    def loss(self, params: Any, batch: Batch) -> Float[Array, ""]:
        """Mean loss of a batch."""

    def value_and_grad(self, params: Any, batch: Batch) -> tuple[Float[Array, ""], Any]:
        """The loss, and the gradient that an optimizer is given."""

    def batch(self, data: TaskData, key: PRNGKeyArray) -> Batch:
        """A batch drawn with replacement."""

    def normalised(self, loss: Float[Array, "..."]) -> Float[Array, "..."]:
        """A loss on the scale that tasks share."""


@dataclass(frozen=True)
class InnerTask:
    """A network, its data and a batch size.

    Attributes:
        family: `mlp` and `conv` classify by cross-entropy; `autoencoder` minimises the mean square of
            what it misses, so that answering with zeros costs 1.
        data: `digits`, `teacher:<seed>` or `tfds:<name>`; see `poisonbench.metatraining.images`.
        resolution: side of the images, in pixels.
        channels: 1 for grey.
        num_classes: labels of the data.
        width: units, or channels, of each hidden layer.
        depth: hidden layers; of an auto-encoder those on either side of its code, which has a quarter
            of the width. A convolution layer halves maps that have an even side of at least 4.
        batch_size: images of a step.
        activation: after each hidden layer.
    """

    family: Family
    data: str
    resolution: int
    width: int
    depth: int
    batch_size: int
    activation: Activation = "relu"
    channels: int = 1
    num_classes: int = 10

    def __post_init__(self) -> None:
        if self.family not in FAMILIES or self.activation not in ACTIVATIONS:
            raise UserError(f"a task is of {FAMILIES} and {ACTIVATIONS}: {self}")
        if min(self.resolution, self.width, self.batch_size, self.channels) < 1 or self.depth < 0:
            raise UserError(f"sizes of a task are positive: {self}")
        if self.num_classes < 2:
            raise UserError(f"a task has at least two classes: {self}")

    @property
    def name(self) -> str:
        """All fields in brief."""
        data = self.data.removeprefix("tfds:").replace(":", "_").replace("/", "_")
        shape = f"{self.resolution}x{self.resolution}x{self.channels}"
        sizes = f"w{self.width}-d{self.depth}-b{self.batch_size}"
        return f"{self.family}-{data}-{shape}-{sizes}-{self.activation}"

    def init(self, key: PRNGKeyArray) -> Params:
        """Fresh parameters: `{"layer0": {"w", "b"}, …}`, float32.

        Weights are normal with variance 2 / fan-in, of the last layer 1 / fan-in; biases are zero.
        """
        shapes = self._shapes()
        keys = jax.random.split(key, len(shapes))
        params = {}
        for i, (shape, own) in enumerate(zip(shapes, keys, strict=True)):
            gain = 1.0 if i == len(shapes) - 1 else 2.0
            scale = math.sqrt(gain / math.prod(shape[:-1]))
            w = scale * jax.random.normal(own, shape, jnp.float32)
            params[f"layer{i}"] = {"w": w, "b": jnp.zeros(shape[-1], jnp.float32)}
        return params

    def loss(self, params: Params, batch: Batch) -> Float[Array, ""]:
        """Mean loss of a batch: cross-entropy in nats, or the mean square of what is missed."""
        outputs = self._forward(params, batch.images)
        if self.family == "autoencoder":
            return jnp.mean((outputs - batch.images.reshape(outputs.shape)) ** 2)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, batch.labels).mean()

    def value_and_grad(self, params: Params, batch: Batch) -> tuple[Float[Array, ""], Params]:
        """The loss and its gradient."""
        return jax.value_and_grad(self.loss)(params, batch)

    def batch(self, data: TaskData, key: PRNGKeyArray) -> Batch:
        """`batch_size` images drawn with replacement."""
        rows = jax.random.randint(key, (self.batch_size,), 0, len(data.labels))
        return Batch(data.images[rows], data.labels[rows])

    def normalised(self, loss: Float[Array, "..."]) -> Float[Array, "..."]:
        """The loss on the scale that tasks share: the lower the better, about 7 to 10 for chance."""
        if self.family == "autoencoder":
            known = jnp.nan_to_num(loss, nan=math.e, posinf=math.e)
            return jnp.clip(jnp.log(known + 1e-8), -12.0, 1.0) / 2 + 10
        worst, classes = math.log(2 * self.num_classes), self.num_classes
        known = jnp.clip(jnp.nan_to_num(loss, nan=worst, posinf=worst), 0.0, worst)
        return (known - math.log(classes / 5)) * 10 / math.log(classes)

    def _shapes(self) -> list[tuple[int, ...]]:
        """Of each layer's weights."""
        pixels = self.resolution**2 * self.channels
        if self.family == "conv":
            sizes, side = [self.channels, *[self.width] * self.depth], self.resolution
            for _ in range(self.depth):
                side = side // 2 if _worth_halving(side) else side
            kernels = [(3, 3, a, b) for a, b in pairwise(sizes)]
            return [*kernels, (side**2 * sizes[-1], self.num_classes)]
        if self.family == "mlp":
            sizes = [pixels, *[self.width] * self.depth, self.num_classes]
        else:
            hidden = [self.width] * self.depth
            sizes = [pixels, *hidden, max(2, self.width // 4), *hidden, pixels]
        return list(pairwise(sizes))

    def _forward(self, params: Params, pixels: Float[Array, "batch height width channels"]) -> Array:
        """Logits `[batch, classes]`, or pixels `[batch, height · width · channels]`."""
        activate = {"relu": jax.nn.relu, "tanh": jnp.tanh, "gelu": jax.nn.gelu}[self.activation]
        layers = [params[f"layer{i}"] for i in range(len(params))]
        x = pixels if self.family == "conv" else pixels.reshape(len(pixels), -1)
        for layer in layers[:-1]:
            if self.family == "conv":
                x = activate(convolve(x, layer["w"], for_backend()) + layer["b"][None, None, None])
                x = _halved(x)
            else:
                x = activate(x @ layer["w"] + layer["b"][None])
        return x.reshape(len(x), -1) @ layers[-1]["w"] + layers[-1]["b"][None]


def load_data(task: InnerTask, data_dir: str | os.PathLike[str] | None = None) -> TaskData:
    """The images of a task.

    Args:
        task: which set, at which size.
        data_dir: TFDS data directory; None for TFDS's own.

    Raises:
        UserError: no such set, it cannot be had, or it has more classes than the task knows.
    """
    data = images.load(task.data, task.resolution, task.channels, data_dir)
    if int(data.labels.max()) >= task.num_classes:
        raise UserError(f"{task.data} has more classes than the {task.num_classes} of {task.name}")
    return data


def draw(
    key: PRNGKeyArray,
    count: int,
    datasets: Sequence[str] = DATASETS,
    families: Sequence[Family] = FAMILIES,
    data_dir: str | os.PathLike[str] | None = None,
) -> list[InnerTask]:
    """Tasks of the training distribution.

    Family, data set, activation, depth and resolution are uniform; width and batch size log-uniform,
    over the ranges at the head of this file. `teacher` becomes a synthetic set of a random seed; the
    images of a TFDS set are averaged to grey.

    Args:
        key: decides everything.
        count: how many.
        datasets: `digits`, `teacher`, `tfds:<name>`.
        families: which networks.
        data_dir: TFDS data directory, to look up numbers of classes.

    Raises:
        UserError: none is asked for, or no such data set.
    """
    if count < 1 or not datasets or not families:
        raise UserError("at least one task, data set and family")
    classes = {name: images.num_classes(name, data_dir) for name in datasets}
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def log_uniform(low: int, high: int) -> int:
        return round(math.exp(rng.uniform(math.log(low), math.log(high))))

    def one() -> InnerTask:
        family = families[int(rng.integers(len(families)))]
        name = datasets[int(rng.integers(len(datasets)))]
        return InnerTask(
            family=family,
            data=f"teacher:{rng.integers(TEACHERS)}" if name == "teacher" else name,
            resolution=int(rng.integers(RESOLUTIONS[0], RESOLUTIONS[1] + 1)),
            width=log_uniform(*WIDTHS[family]),
            depth=int(rng.integers(DEPTHS[family][0], DEPTHS[family][1] + 1)),
            batch_size=log_uniform(*BATCHES),
            activation=ACTIVATIONS[int(rng.integers(len(ACTIVATIONS)))],
            num_classes=classes[name],
        )

    return [one() for _ in range(count)]


def drawable(task: InnerTask) -> bool:
    """Whether `draw`, with its default data sets, could give this task."""
    kind, _, seed = task.data.partition(":")
    known = kind == "digits" or (kind == "teacher" and int(seed or 0) < TEACHERS)
    ranges = (
        (task.width, WIDTHS[task.family]),
        (task.depth, DEPTHS[task.family]),
        (task.batch_size, BATCHES),
        (task.resolution, RESOLUTIONS),
    )
    return known and task.channels == 1 and all(low <= x <= high for x, (low, high) in ranges)


def _worth_halving(side: int) -> bool:
    return side >= 4 and side % 2 == 0


def _halved(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w channels"]:
    """Averages over 2×2, of maps that are worth halving."""
    batch, height, width, channels = x.shape
    if not _worth_halving(height):
        return x
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))
