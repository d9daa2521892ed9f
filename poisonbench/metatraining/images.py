"""The images that inner tasks learn: a few thousand, small, and standardised.

`digits` needs no download, and neither does `teacher`: Gaussian images whose spectrum falls with the
frequency as that of photographs does (Field, 1987), each labelled by the strongest output of a random
network, outputs being standardised first so that classes come about equally often. `teacher:<seed>` is
one such set; `teacher` is `teacher:0`. `tfds:<name>` is read as everywhere in poisonbench.

Nothing is ever read that victims are scored on: of `digits` the images outside the test split of its
track, of `tfds:<name>` those outside the official test split.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from poisonbench import data
from poisonbench.errors import UserError, unknown_name
from poisonbench.tracks import DIGITS

KEPT = 4096
"""Images of a set, at most."""
TEACHER_UNITS = 32
Images = Float[np.ndarray, "n height width channels"]
Labels = Int[np.ndarray, " n"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TaskData:
    """What an inner task draws its batches from.

    Attributes:
        images: `[n, resolution, resolution, channels]`, float32, of mean 0 and variance 1 over the set.
        labels: `[n]`, int32.
    """

    images: Array
    labels: Array


def load(
    name: str,
    resolution: int,
    channels: int = 1,
    data_dir: str | os.PathLike[str] | None = None,
) -> TaskData:
    """Read or make a set; the same arguments give the same arrays.

    Args:
        name: `digits`, `teacher`, `teacher:<seed>` or `tfds:<name>`.
        resolution: side of the images, by area averaging of sets that have a size of their own.
        channels: of the images; with 1, colours are averaged.
        data_dir: TFDS data directory; None for TFDS's own.

    Raises:
        UserError: no such set, or it cannot be had at this size.
    """
    if _teacher_seed(name) is not None:
        images, labels = _teacher(_teacher_seed(name) or 0, resolution, channels)
    else:
        pixels, labels, _ = _pool(name, data_dir)
        images = data.downscale(pixels, resolution).astype(np.float32)
        if channels == 1:
            images = images.mean(-1, keepdims=True)
        elif images.shape[-1] != channels:
            raise UserError(f"{name} has images of {images.shape[-1]} channels, not {channels}")
    images = (images - images.mean()) / images.std()
    return TaskData(jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32))


def num_classes(name: str, data_dir: str | os.PathLike[str] | None = None) -> int:
    """How many labels a set has.

    Raises:
        UserError: no such set.
    """
    return 10 if _teacher_seed(name) is not None else _pool(name, data_dir)[2]


def _pool(
    name: str, data_dir: str | os.PathLike[str] | None
) -> tuple[UInt8[np.ndarray, "n height width channels"], Labels, int]:
    """Bytes, labels and the number of classes of a set that victims are not scored on."""
    if name == "digits":
        split = data.load(DIGITS.dataset)
        images = np.concatenate([split.train_images, split.val_images])
        return images, np.concatenate([split.train_labels, split.val_labels]), split.num_classes
    if not name.startswith("tfds:"):
        raise unknown_name("data set of tasks", name, ["digits", "teacher", "teacher:1", "tfds:cifar10"])
    from poisonbench import _tfds

    pool = _tfds.pool(name.removeprefix("tfds:"), data_dir)
    rows = np.sort(np.random.default_rng(0).permutation(len(pool.labels))[:KEPT])
    return np.asarray(pool.images[rows]), np.asarray(pool.labels[rows]), len(pool.class_names)


def _teacher_seed(name: str) -> int | None:
    """The seed of a synthetic set; None for the name of any other."""
    kind, colon, seed = name.partition(":")
    if kind != "teacher":
        return None
    if colon and not (seed.isascii() and seed.isdigit() and len(seed) < 10):
        raise UserError(f"{name} names no synthetic set: give a seed, as in teacher:1")
    return int(seed or 0)


def _teacher(seed: int, resolution: int, channels: int) -> tuple[Images, Labels]:
    rng = np.random.default_rng([seed, resolution, channels])
    frequency = np.fft.fftfreq(resolution) * resolution
    fall = 1 / (1 + np.hypot(frequency[:, None], frequency[None, :]))
    noise = rng.normal(size=(KEPT, resolution, resolution, channels))
    images = np.fft.ifft2(np.fft.fft2(noise, axes=(1, 2)) * fall[None, :, :, None], axes=(1, 2)).real
    flat = images.reshape(KEPT, -1) / images.std()
    first = rng.normal(size=(flat.shape[1], TEACHER_UNITS)) / np.sqrt(flat.shape[1])
    second = rng.normal(size=(TEACHER_UNITS, 10))
    outputs = np.tanh(2 * flat @ first) @ second
    outputs = (outputs - outputs.mean(0)) / outputs.std(0)
    return images.astype(np.float32), outputs.argmax(1)
