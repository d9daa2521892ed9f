"""Image shortcut squeezing: train on grey images, or on ones that went through JPEG at low quality.

Perturbations that make a set unlearnable hide in colour or in high frequencies. Taking either away
from the training images leaves what a person sees.

Paper: Liu, Zhao and Larson, "Image Shortcut Squeezing: Countering Perturbative Availability Poisons
with Compression", ICML 2023, https://arxiv.org/abs/2301.13838: grey images against low-frequency
perturbations, JPEG of quality 10 against the others, either alone; on average over twelve attacks 81.73
% on CIFAR-10. Test images are left as they are. The JPEG is real, by Pillow.

What is left open, and how it is settled here: which of the two an attack calls for is not known
beforehand, so both are applied by default, which costs more than either: `how` names one. The paper's
third means, fewer levels of each pixel, is left out.

Cost: 1.1 victim trainings on `digits`: its own, and a JPEG of every image, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from jaxtyping import PRNGKeyArray, UInt8
from PIL import Image

from poisonbench.defenses import Defense, View
from poisonbench.errors import UserError


@dataclass(frozen=True)
class ISS(Defense):
    """Squeezed training images.

    Attributes:
        how: `jpeg`, `grey`, or `both`, grey first. Images of one channel are grey already.
        quality: of the JPEG, from 1 to 95.
    """

    how: Literal["jpeg", "grey", "both"] = "both"
    quality: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 95:
            raise UserError("iss.quality must lie between 1 and 95")

    def preprocess(self, view: View, key: PRNGKeyArray) -> UInt8[np.ndarray, "n h w c"]:
        """Every training image, squeezed."""
        return np.stack([self._squeezed(image) for image in view.images])

    def _squeezed(self, pixels: np.ndarray) -> np.ndarray:
        channels = pixels.shape[-1]
        image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
        if self.how != "jpeg" and channels == 3:
            image = image.convert("L").convert("RGB")
        if self.how != "grey":
            stored = BytesIO()
            image.save(stored, "JPEG", quality=self.quality)
            image = Image.open(stored)
        return np.asarray(image, np.uint8).reshape(pixels.shape)
