"""Images that look like the next class to a linear model, by the Adversarial Robustness Toolbox.

Paper: Fowl et al., "Adversarial Examples Make Strong Poisons", 2021, https://arxiv.org/abs/2106.10807.
Cost: one logistic regression, and twenty of its gradients for each image.
"""

from dataclasses import dataclass

import numpy as np
from art.attacks.evasion import ProjectedGradientDescentNumpy
from art.estimators.classification import SklearnClassifier
from sklearn.linear_model import LogisticRegression

from poisonbench.attacks import Attack
from poisonbench.perturb import radius, require_radius


@dataclass(frozen=True)
class ArtPGD(Attack):
    """Twenty signed steps within the radius; labels stay. It has no options."""

    def require(self, budget):
        """A perturbation needs a radius."""
        require_radius(budget, "art_pgd")

    def craft(self, task, key, journal):
        """Images moved towards the class after their own."""
        x, y = task.train_images.reshape(len(task.train_images), -1) / 255, task.train_labels
        rows, eps = task.random_indices(key), radius(task)
        linear = LogisticRegression(max_iter=1000).fit(x, y)
        model = SklearnClassifier(linear, clip_values=(0, 1))
        pgd = ProjectedGradientDescentNumpy(
            model, eps=eps, eps_step=eps / 5, max_iter=20, targeted=True, verbose=False
        )
        moved = pgd.generate(x[rows], np.eye(task.num_classes)[(y[rows] + 1) % task.num_classes])
        images = np.rint(255 * moved).reshape(-1, *task.train_images.shape[1:])
        return task.poison(rows, np.clip(images, *task.bounds(rows)).astype(np.uint8), y[rows])
