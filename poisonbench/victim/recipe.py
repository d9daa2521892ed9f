"""What a victim is: every number of its architecture and training, frozen.

Two recipes carry names. `SMOOTH` is the ResNet-9 that the metagradient paper made
metasmooth: batch norm before a GELU, average pooling, more width, and a final layer
scaled down, so that the loss after training changes smoothly with the training pixels.
`STANDARD` is the usual fast ResNet-9: ReLU, max pooling, unscaled logits. Tracks override
the numbers that depend on the size of the data set (width, batch, epochs, learning rate).

References:
    Engstrom et al., "Optimizing ML Training with Metagradient Descent", 2025,
    https://arxiv.org/abs/2503.13751 (smoothness). David Page, "How to train your ResNet",
    2018 (the architecture).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from poisonbench.errors import UserError, unknown_name

Network = Literal["resnet9", "cnn"]
Activation = Literal["relu", "gelu"]
Pooling = Literal["max", "average"]
NormPlacement = Literal["before_activation", "after_activation"]
Schedule = Literal["one_cycle", "constant"]


@dataclass(frozen=True)
class Recipe:
    """A victim's architecture and training; hashable, so it can be a static argument.

    Attributes:
        network: `resnet9`; or `cnn`, three plain convolutions without batch norm, to see how poison
            fares on a victim of another kind.
        width: channels of the first convolution; later stages have 2, 4 and 8 times as many.
        activation: nonlinearity after every convolution.
        pooling: how maps shrink, at each stage and before the classifier.
        norm: batch normalisation before or after the activation.
        final_scale: factor on the logits. Small values keep the softmax unsaturated.
        norm_momentum: share of the old value that the tracked statistics keep at each step.
        norm_epsilon: added to the variance in batch normalisation.
        epochs: passes over the training set.
        batch_size: images in a step; what is left of an epoch after the last full batch is
            dropped, and each epoch has an order of its own.
        optimizer: name of any optimizer in `optax` that takes a learning rate; or `velo` or `mlp_opt`,
            with the weights that come with this package (see `poisonbench.optimizers`), which have no
            use for a learning rate, and no option but to name those weights by their hash.
        optimizer_options: its keyword arguments. Adam needs `eps_root > 0` under a
            metagradient: the root of its second moment has no derivative at zero.
        learning_rate: the peak.
        schedule: `one_cycle` is piecewise linear: `start_factor` of the peak at step 0, the
            peak after the share `peak_at` of the steps, `final_factor` of it at the end.
        weight_decay: decoupled from the loss, coupled with the momentum (as in SGD with L2);
            on kernels only, not on biases or batch norm.
        label_smoothing: share of each label spread evenly over all classes.
        flip: mirror each image with probability one half.
        crop_padding: shift each image by up to this many pixels, padding with its mean level.
        input_mean, input_std: pixels enter the network as `(x - mean) / std`. Constants rather
            than statistics of the data, so that poison cannot move them.
    """

    network: Network = "resnet9"
    width: int = 64
    activation: Activation = "gelu"
    pooling: Pooling = "average"
    norm: NormPlacement = "before_activation"
    final_scale: float = 0.125
    norm_momentum: float = 0.9
    norm_epsilon: float = 1e-5
    epochs: int = 18
    batch_size: int = 250
    optimizer: str = "sgd"
    optimizer_options: tuple[tuple[str, float | bool | str], ...] = (("momentum", 0.85),)
    learning_rate: float = 0.5
    schedule: Schedule = "one_cycle"
    start_factor: float = 0.5
    peak_at: float = 0.25
    final_factor: float = 1e-4
    weight_decay: float = 1e-5
    label_smoothing: float = 0.0
    flip: bool = False
    crop_padding: int = 0
    input_mean: float = 0.5
    input_std: float = 0.25

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise unknown_name(f"value of {name}", str(value), allowed)
        for name, value in self.as_dict().items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"recipe: {name} must be finite, not {value}")
        for name in ("width", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"recipe: {name} must be at least 1, not {getattr(self, name)}")
        for name in ("learning_rate", "final_scale", "input_std", "norm_epsilon"):
            if not getattr(self, name) > 0:
                raise UserError(f"recipe: {name} must be above 0, not {getattr(self, name)}")
        for name in ("norm_momentum", "peak_at", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"recipe: {name} must lie in [0, 1], not {getattr(self, name)}")
        for name in ("weight_decay", "crop_padding"):
            if getattr(self, name) < 0:
                raise UserError(f"recipe: {name} must not be negative")

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some numbers changed."""
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Every field, JSON-ready."""
        return {**asdict(self), "optimizer_options": dict(self.optimizer_options)}

    def steps_per_epoch(self, num_images: int) -> int:
        """Full batches in an epoch over `num_images`.

        Raises:
            UserError: the batch is larger than the training set.
        """
        if self.batch_size > num_images:
            raise UserError(
                f"batch_size {self.batch_size} is larger than the training set of {num_images}"
                " images: lower it with --set batch_size=…"
            )
        return num_images // self.batch_size

    def num_steps(self, num_images: int) -> int:
        """Optimizer steps in a whole training run over `num_images`."""
        return self.epochs * self.steps_per_epoch(num_images)


_CHOICES: dict[str, tuple[str, ...]] = {
    "network": get_args(Network),
    "activation": get_args(Activation),
    "pooling": get_args(Pooling),
    "norm": get_args(NormPlacement),
    "schedule": get_args(Schedule),
}

SMOOTH = Recipe(width=128)
STANDARD = Recipe(
    width=64,
    activation="relu",
    pooling="max",
    final_scale=1.0,
    optimizer_options=(("momentum", 0.9), ("nesterov", True)),
    learning_rate=0.4,
    start_factor=0.1,
    weight_decay=5e-4,
)
RECIPES: dict[str, Recipe] = {"smooth": SMOOTH, "standard": STANDARD}
LEARNED = {"velo": "eaffe1d857d7", "mlp_opt": "f77f33267158"}
"""Learned optimizers, and twelve digits of the `optimizers.weights.digest` of what comes with them."""
