"""What tests of data sets ask of one."""

from __future__ import annotations

import numpy as np

from poisonbench.data import Dataset


def rows(images: np.ndarray) -> list[bytes]:
    return [image.tobytes() for image in images]


def splits(dataset: Dataset) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {
        "train": (dataset.train_images, dataset.train_labels),
        "val": (dataset.val_images, dataset.val_labels),
        "test": (dataset.test_images, dataset.test_labels),
    }


def same(a: Dataset, b: Dataset) -> bool:
    return a.hashes() == b.hashes() and a.class_names == b.class_names
