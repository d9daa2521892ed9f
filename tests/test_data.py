"""Data sets are split once and for all.

Claims of `poisonbench.data` tested here; `test_tfds.py` has those of reading TFDS sets:

- splits have the sizes asked for, share no image, and are stratified; the same spec gives the same
  hashes, recorded here, and another split seed gives others;
- downscaling averages areas, crops the centre of what is not square, and refuses to enlarge;
- sizes that do not fit and names that are not there are refused in one line that says what to do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datachecks import rows, same, splits

from poisonbench import data
from poisonbench.data import Dataset, DataSpec
from poisonbench.errors import UserError

DIGITS = DataSpec(name="digits", train_size=300, val_size=200, test_size=100)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load(DIGITS)


def test_digits_have_the_sizes_asked_for(digits: Dataset) -> None:
    sizes = {name: (len(images), len(labels)) for name, (images, labels) in splits(digits).items()}
    assert sizes == {"train": (300, 300), "val": (200, 200), "test": (100, 100)}
    for images, labels in splits(digits).values():
        assert images.shape[1:] == (8, 8, 1)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
    assert digits.class_names == tuple("0123456789")
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 255)


def test_splits_share_no_image(digits: Dataset) -> None:
    everything = data.load(DIGITS.model_copy(update={"train_size": None}))
    pool = [row for images, _ in splits(everything).values() for row in rows(images)]
    assert len(pool) == len(set(pool)) == 1797  # so a row identifies an image
    drawn = [row for images, _ in splits(digits).values() for row in rows(images)]
    assert len(drawn) == len(set(drawn)) == 600
    assert set(drawn) < set(pool)
    assert set(rows(everything.test_images)) == set(rows(digits.test_images))
    assert set(rows(everything.val_images)) == set(rows(digits.val_images))


def test_every_split_is_stratified(digits: Dataset) -> None:
    everything = data.load(DIGITS.model_copy(update={"train_size": None}))
    left = np.bincount(np.concatenate([labels for _, labels in splits(everything).values()]))
    for name in ("test", "val", "train"):  # the order they are drawn in
        counts = np.bincount(splits(digits)[name][1], minlength=10)
        share = left / left.sum() * counts.sum()
        assert np.abs(counts - share).max() <= 1
        left = left - counts


def test_the_same_spec_gives_the_same_hashes(digits: Dataset) -> None:
    again, other = data.load(DIGITS), data.load(DIGITS.model_copy(update={"split_seed": 1}))
    assert same(digits, again)
    assert not set(digits.hashes().values()) & set(other.hashes().values())
    assert other.num_classes == 10


def test_the_splits_of_the_digits_track_are_those_of_the_records() -> None:
    from poisonbench.tracks import DIGITS as TRACK

    hashes = {name: text[:16] for name, text in data.load(TRACK.dataset).hashes().items()}
    assert hashes == {
        "train": "854bfae2d6355a62",
        "val": "04b14cc2d0cd07e3",
        "test": "aef19b41a1a5805a",
    }


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"test_size": 5000}, "--test-size"),
        ({"val_size": 1697}, "--val-size"),
        ({"val_size": 5000}, "--val-size"),
        ({"train_size": 1498}, "--train-size"),
        ({"train_size": 3}, "train"),
        ({"test_size": None}, "--test-size"),
        ({"resolution": 9}, "--resolution 9"),
    ],
)
def test_sizes_that_do_not_fit_name_the_option(changes: dict[str, Any], option: str) -> None:
    with pytest.raises(UserError, match=option) as caught:
        data.load(DIGITS.model_copy(update=changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hint"), [("digit", "did you mean digits"), ("cifar10", "tfds:cifar10"), ("", "digits")]
)
def test_an_unknown_set_is_refused_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        data.load(DataSpec(name=name, val_size=10, test_size=10))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_downscaling_averages_blocks(factor: int, channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 12, 12, channels)).astype(np.uint8)
    side = 12 // factor
    blocks = images.reshape(5, side, factor, side, factor, channels).mean((2, 4))
    small = data.downscale(images, side)
    assert (small.shape, small.dtype) == ((5, side, side, channels), np.uint8)
    # Rows and columns are averaged one after the other, and each rounds by at most a half.
    assert np.abs(small - blocks).max() <= (1 if factor > 1 else 0)
    if factor > 1:  # picking pixels would not do
        assert np.abs(images[:, ::factor, ::factor] - blocks).max() > 1


def test_fractional_factors_weigh_by_area() -> None:
    ramp = np.array([[0, 90, 180]], np.uint8).repeat(3, axis=0)[None, ..., None]
    np.testing.assert_array_equal(data.downscale(ramp, 2)[0, 0, :, 0], [30, 150])


@pytest.mark.parametrize("shape", [(4, 8), (8, 4), (5, 4)])
def test_what_is_not_square_loses_its_edges(shape: tuple[int, int]) -> None:
    height, width = shape
    images = np.arange(height * width, dtype=np.uint8).reshape(1, height, width, 1)
    top, left = (height - 4) // 2, (width - 4) // 2
    centre = images[:, top : top + 4, left : left + 4]
    np.testing.assert_array_equal(data.downscale(images, 4), centre)
    blocks = centre.reshape(1, 2, 2, 2, 2, 1).mean((2, 4))
    assert np.abs(data.downscale(images, 2) - blocks).max() <= 1


def test_nothing_is_enlarged() -> None:
    with pytest.raises(UserError, match="would enlarge images of 4×9: use at most 4"):
        data.downscale(np.zeros((1, 4, 9, 1), np.uint8), 5)
