"""The held-out tasks. They are frozen: scores of one version of this file are comparable.

None can be drawn in meta-training, as long as that keeps to the data that need no download: the
networks are wider or deeper, the batch is larger, the synthetic data have other seeds, or the images are
CIFAR-10, in grey or colour, at 8 or 16 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from poisonbench.metatraining.tasks import InnerTask

CIFAR10 = "tfds:cifar10"

HELD_OUT: Mapping[str, InnerTask] = MappingProxyType(
    {
        "mlp-digits": InnerTask("mlp", "digits", 8, 96, 4, 64),
        "mlp-digits-large-batch": InnerTask("mlp", "digits", 8, 32, 2, 256),
        "conv-digits": InnerTask("conv", "digits", 8, 16, 2, 32),
        "autoencoder-digits": InnerTask("autoencoder", "digits", 8, 128, 1, 64),
        "linear-teacher": InnerTask("mlp", "teacher:1003", 6, 8, 0, 64),
        "mlp-teacher": InnerTask("mlp", "teacher:1000", 8, 32, 2, 64, "tanh"),
        "conv-teacher": InnerTask("conv", "teacher:1001", 8, 8, 2, 32, "gelu"),
        "autoencoder-teacher": InnerTask("autoencoder", "teacher:1002", 8, 64, 2, 64, "tanh"),
        "mlp-cifar8-grey": InnerTask("mlp", CIFAR10, 8, 32, 1, 64),
        "mlp-cifar8": InnerTask("mlp", CIFAR10, 8, 64, 2, 128, "gelu", channels=3),
        "conv-cifar8": InnerTask("conv", CIFAR10, 8, 8, 2, 32, channels=3),
        "autoencoder-cifar8": InnerTask("autoencoder", CIFAR10, 8, 64, 1, 64, channels=3),
        "mlp-cifar16-grey": InnerTask("mlp", CIFAR10, 16, 64, 1, 64),
        "conv-cifar16": InnerTask("conv", CIFAR10, 16, 8, 3, 16, channels=3),
        "autoencoder-cifar16-grey": InnerTask("autoencoder", CIFAR10, 16, 64, 1, 64, "tanh"),
    }
)


def needs_download(task: InnerTask) -> bool:
    """Whether its images do not come with the dependencies."""
    return task.data.startswith("tfds:")
