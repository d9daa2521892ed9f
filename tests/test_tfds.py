"""TFDS sets are read without TensorFlow, and decoded once.

Claims of `poisonbench._tfds`, and of `poisonbench.data` about such sets, tested here:

- names that are not there, folders that hold nothing and sets that are not for image classification
  are refused in one line that says what to do;
- CIFAR-10 is read without TensorFlow, and its official test split stays apart;
- a set is decoded once: what is cached is the same, and is used until the files behind it change or
  the cache itself is spoilt.

Decoding all of CIFAR-10 is marked slow; the quick tests decode the first images of each split.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datachecks import rows, same, splits

from poisonbench import _tfds, data
from poisonbench.data import Dataset, DataSpec
from poisonbench.errors import UserError

# A tiny set that looks like one of TFDS, so that the cache can be tested without a download.


@dataclass
class Builder:
    """What `_decode` uses of a TFDS builder; counts how often it is read."""

    data_path: Path
    features: dict[str, Any]
    names: tuple[str, ...] = ("train", "test")
    keys: Any = ("image", "label")
    read: list[str] = field(default_factory=list)
    name: str = "tiny"

    @property
    def info(self) -> Any:
        split = SimpleNamespace(num_examples=40)
        return SimpleNamespace(
            supervised_keys=self.keys, features=self.features, splits=dict.fromkeys(self.names, split)
        )

    def as_data_source(self, split: str) -> list[dict[str, Any]]:
        self.read.append(split)
        rng = np.random.default_rng(len(split))
        images = rng.integers(0, 256, (40, 8, 8, 3)).astype(np.uint8)
        return [{"image": image, "label": i % 4} for i, image in enumerate(images)]


TINY = DataSpec(name="tfds:tiny", train_size=20, val_size=8, test_size=12)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr(_tfds, "cache_folder", lambda kind: folder / kind)
    return folder


@pytest.fixture
def builder(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    import tensorflow_datasets as tfds

    prepared = tmp_path / "prepared"
    prepared.mkdir()
    (prepared / "tiny-train.array_record").write_bytes(b"content")
    features = {
        "image": tfds.features.Image(shape=(8, 8, 3)),
        "label": tfds.features.ClassLabel(names=["a", "b", "c", "d"]),
        "text": tfds.features.Text(),
        "any": tfds.features.Image(shape=(None, None, 3)),
    }
    tiny = Builder(prepared, features)
    monkeypatch.setattr(_tfds, "_builder", lambda name, directory: tiny)
    return tiny


def test_a_set_is_decoded_once(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    first = data.load(TINY)
    assert builder.read == ["train", "test"]
    monkeypatch.setattr(_tfds, "_builder", unreachable)
    assert same(first, data.load(TINY))
    assert first.class_names == ("a", "b", "c", "d")


def unreachable(name: str, directory: Path | None) -> Any:
    raise AssertionError("the cache was not used")


def test_the_official_test_split_stays_apart(builder: Builder) -> None:
    dataset = data.load(TINY)
    official = [example["image"] for example in builder.as_data_source("test")]
    test = set(rows(np.array(official)))
    assert set(rows(dataset.test_images)) < test
    assert not set(rows(np.concatenate([dataset.train_images, dataset.val_images]))) & test
    whole = data.load(TINY.model_copy(update={"test_size": None}))
    assert set(rows(whole.test_images)) == test


def test_a_set_without_a_test_split_is_split(builder: Builder) -> None:
    builder.names = ("train",)
    dataset = data.load(TINY)
    drawn = [row for images, _ in splits(dataset).values() for row in rows(images)]
    assert len(set(drawn)) == 40
    assert builder.read == ["train"]
    assert same(dataset, data.load(TINY))
    assert builder.read == ["train"]


def test_data_folders_have_a_cache_each(builder: Builder, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        data.load(TINY, tmp_path / name)
    assert builder.read == ["train", "test"] * 2


def touch(folder: Path, cache: Path) -> None:
    os.utime(folder / "tiny-train.array_record", ns=(0, 0))


def grow(folder: Path, cache: Path) -> None:
    path = folder / "tiny-train.array_record"
    stat = path.stat()
    path.write_bytes(b"content and more")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def add(folder: Path, cache: Path) -> None:
    (folder / "tiny-train.array_record-00001").write_bytes(b"")


def lose_an_array(folder: Path, cache: Path) -> None:
    next(cache.rglob("labels.npy")).unlink()


def cut_an_array(folder: Path, cache: Path) -> None:
    path = next(cache.rglob("test_images.npy"))
    path.write_bytes(path.read_bytes()[:-100])


def cut_the_index(folder: Path, cache: Path) -> None:
    path = next(cache.rglob("index.json"))
    path.write_text(path.read_text()[:-10])


def forge_the_index(folder: Path, cache: Path) -> None:
    path = next(cache.rglob("index.json"))
    index = json.loads(path.read_text())
    index["files"] = {name: [0, 0] for name in index["files"]}
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "change",
    [touch, grow, add, lose_an_array, cut_an_array, cut_the_index, forge_the_index],
    ids=lambda change: change.__name__,
)
def test_a_cache_that_cannot_be_trusted_is_made_anew(change: Any, builder: Builder, cache: Path) -> None:
    first = data.load(TINY)
    change(builder.data_path, cache)
    assert same(first, data.load(TINY))
    assert builder.read == ["train", "test"] * 2
    assert same(first, data.load(TINY))
    assert builder.read == ["train", "test"] * 2


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"keys": None}, "names no image and label"),
        ({"keys": ("image", "text", "label")}, "names no image and label"),
        ({"keys": ("text", "label")}, "is not an image-classification set"),
        ({"keys": ("image", "text")}, "is not an image-classification set"),
        ({"keys": ("any", "label")}, "differ in size"),
        ({"names": ("test",)}, "has no train split"),
    ],
)
def test_a_set_of_another_kind_is_refused(
    changes: dict[str, Any], problem: str, builder: Builder, cache: Path
) -> None:
    for name, value in changes.items():
        setattr(builder, name, value)
    with pytest.raises(UserError, match=problem) as caught:
        data.load(TINY)
    assert "tiny" in str(caught.value)
    assert list(cache.rglob("*.npy")) == []


# Names and folders, as TFDS itself sees them.


def refused(name: str, folder: Path | None) -> str:
    with pytest.raises(UserError) as caught:
        data.load(DataSpec(name=name, val_size=10, test_size=10), folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.usefixtures("cache")
def test_a_folder_without_the_set_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = refused("tfds:cifar10", tmp_path / "empty")
    assert f"{tmp_path / 'empty'} holds no prepared cifar10" in message
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.usefixtures("cache")
def test_a_data_dir_must_be_a_folder(tmp_path: Path) -> None:
    assert "is not a folder" in refused("tfds:cifar10", tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "is not a folder" in refused("tfds:cifar10", tmp_path / "file")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tfds:cifar1", "did you mean cifar10"),
        ("tfds:minst", "did you mean mnist"),
        ("tfds:zzzzqqqq", "catalogue"),
        ("tfds:cifar10:9.9.9", "cifar10"),
        ("tfds:cifar10/nothing", "cifar10"),
    ],
)
def test_an_unknown_tfds_set_is_refused(name: str, hint: str, tmp_path: Path) -> None:
    assert hint in refused(name, tmp_path)


@pytest.mark.usefixtures("cache")
def test_a_download_that_fails_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tensorflow_datasets as tfds

    def fail(**options: object) -> None:
        raise ConnectionError("no route\nto host")

    unprepared = SimpleNamespace(data_path=tmp_path / "cifar10", download_and_prepare=fail, url_infos={})
    monkeypatch.setattr(tfds, "builder", lambda name, **options: unprepared)
    message = refused("tfds:cifar10", None)
    assert message.startswith("cannot download cifar10: ConnectionError: no route;")
    assert "--data-dir" in message
    assert f"downloading cifar10 to {tmp_path / 'cifar10'}" in capsys.readouterr().err


@pytest.mark.usefixtures("cache")
def test_a_host_that_is_unknown_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import tensorflow_datasets as tfds

    def unknown(host: str, port: int) -> None:
        raise OSError(f"no address for {host}")

    unprepared = SimpleNamespace(
        data_path=tmp_path / "cifar10",
        download_and_prepare=unreachable,
        url_infos={"https://data.invalid/cifar.tar.gz": None},
    )
    monkeypatch.setattr(tfds, "builder", lambda name, **options: unprepared)
    monkeypatch.setattr(_tfds.socket, "getaddrinfo", unknown)
    message = refused("tfds:cifar10", None)
    assert message.startswith("cannot download cifar10: OSError: data.invalid cannot be reached")
    assert "--data-dir" in message


# The real thing.

CIFAR = DataSpec(name="tfds:cifar10", train_size=100, val_size=50, test_size=60)


@pytest.fixture
def without_tensorflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = PathFinder.find_spec

    # As where it is not installed: looking for it finds nothing, which is no error yet.
    def find_spec(name: str, *arguments: Any) -> ModuleSpec | None:
        return None if name.partition(".")[0] == "tensorflow" else real(name, *arguments)

    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorflow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(PathFinder, "find_spec", find_spec)
    yield
    assert "tensorflow" not in sys.modules


class First:
    """A TFDS builder of which only the first images of each split are read."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._builder, name)

    def as_data_source(self, split: str) -> Any:
        return self._builder.as_data_source(split=f"{split}[:200]")


def check_cifar10(dataset: Dataset) -> None:
    assert dataset.num_classes == 10
    assert dataset.class_names[:3] == ("airplane", "automobile", "bird")
    for images, labels in splits(dataset).values():
        assert images.shape == (len(labels), 32, 32, 3)
        assert set(labels.tolist()) == set(range(10))
        assert 90 < images.mean() < 150
        assert (images.min(), images.max()) == (0, 255)
    drawn = [row for images, _ in splits(dataset).values() for row in rows(images)]
    assert len(set(drawn)) == len(drawn) == 210


@pytest.mark.usefixtures("without_tensorflow", "cache")
def test_first_images_of_cifar10_without_tensorflow(
    cifar10_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = _tfds._builder
    monkeypatch.setattr(_tfds, "_builder", lambda name, directory: First(real(name, directory)))
    first = data.load(CIFAR, cifar10_dir)
    check_cifar10(first)
    monkeypatch.setattr(_tfds, "_builder", unreachable)
    assert same(first, data.load(CIFAR, cifar10_dir))
    small = data.load(CIFAR.model_copy(update={"resolution": 16}), cifar10_dir)
    blocks = first.train_images.reshape(-1, 16, 2, 16, 2, 3).mean((2, 4))
    assert np.abs(small.train_images - blocks).max() <= 1


@pytest.mark.slow
@pytest.mark.usefixtures("without_tensorflow", "cache")
def test_all_of_cifar10_without_tensorflow(cifar10_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = data.load(CIFAR, cifar10_dir)
    check_cifar10(first)
    monkeypatch.setattr(_tfds, "_builder", unreachable)
    whole = data.load(
        CIFAR.model_copy(update={"train_size": None, "test_size": None, "val_size": 1000}), cifar10_dir
    )
    counts = [np.bincount(labels).tolist() for _, labels in splits(whole).values()]
    assert counts == [[4900] * 10, [100] * 10, [1000] * 10]
    assert set(rows(first.test_images)) < set(rows(whole.test_images))


@pytest.mark.usefixtures("cache")
def test_a_damaged_file_of_a_prepared_set_is_named(cifar10_dir: Path, tmp_path: Path) -> None:
    source = next(cifar10_dir.glob("cifar10/*/dataset_info.json")).parent
    folder = tmp_path / "data" / "cifar10" / source.name
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if "train" in path.name:
            (folder / path.name).write_bytes(path.read_bytes()[:100_000])
        else:
            (folder / path.name).symlink_to(path)
    assert "cannot read cifar10" in refused("tfds:cifar10", tmp_path / "data")
