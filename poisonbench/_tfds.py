"""TensorFlow Datasets without TensorFlow, decoded once.

TFDS reads array_record files as a random-access source of decoded examples; that takes seconds to
import and minutes to decode at worst, so the arrays are kept in the user's cache folder, bound to
the size and modification time of the files that they came from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np

from poisonbench._files import cache_folder, existing_folder, replacing, write_text
from poisonbench.data import Pool
from poisonbench.errors import UserError, unknown_name
from poisonbench.progress import Progress

CACHE_FORMAT = 1


def pool(name: str, data_dir: str | os.PathLike[str] | None) -> Pool:
    """All images of a TFDS set, and its official test split where there is one.

    Args:
        name: as TFDS knows it, with `/config` or `:version` where wanted.
        data_dir: TFDS data directory; None for TFDS's own.

    Raises:
        UserError: no such set, none prepared in `data_dir`, no image classification, or a
            download that failed.
    """
    directory = None if data_dir is None else existing_folder(data_dir)
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    key = hashlib.sha256(f"{CACHE_FORMAT}|{name}|{directory or default}".encode()).hexdigest()[:16]
    folder = cache_folder("decoded") / key
    if (cached := _cached(folder)) is not None:
        return cached
    return _decode(_builder(name, directory), folder)


def _cached(folder: Path) -> Pool | None:
    try:
        index = json.loads((folder / "index.json").read_text("utf-8"))
        if index["files"] != _stamps(Path(index["source"])):
            return None
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in index["arrays"]
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent, half written or of another time: decode again
    test = (arrays["test_images"], arrays["test_labels"]) if "test_images" in arrays else None
    return Pool(arrays["images"], arrays["labels"], tuple(index["class_names"]), test)


def _stamps(source: Path) -> dict[str, list[int]]:
    """Size and modification time of every file of a prepared set."""
    stats = {path.name: path.stat() for path in sorted(source.iterdir()) if path.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _builder(name: str, directory: Path | None) -> Any:
    tfds = _import_tfds()
    try:
        builder = tfds.builder(name, data_dir=directory, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError:
        error = unknown_name("TFDS set", name, tfds.list_builders(with_community_datasets=False))
        # Hundreds of sets: without a near name, say where they are listed.
        if "did you mean" not in str(error):
            error = UserError(f"no TFDS set called '{name}'; see the TFDS catalogue for their names")
        raise error from None
    except Exception as error:  # TFDS raises whatever its hundreds of builders raise
        raise UserError(f"TFDS cannot open {name}: {_first_line(error)}") from None
    if builder.data_path.joinpath("dataset_info.json").exists():
        return builder
    if directory is not None:
        raise UserError(
            f"{directory} holds no prepared {name} (looked for {builder.data_path}): name the"
            " folder that TFDS prepared it in, or leave --data-dir out to download it"
        )
    print(f"downloading {name} to {builder.data_path} …", file=sys.stderr)
    try:
        _require_hosts(builder)
        builder.download_and_prepare(file_format="array_record")
    except (Exception, SystemExit) as error:
        raise UserError(
            f"cannot download {name}: {_first_line(error)}; prepare it where the network reaches it,"
            " and name its folder with --data-dir"
        ) from None
    return builder


def _require_hosts(builder: Any) -> None:
    """Fail at once where the download's hosts are unknown; TFDS would retry for minutes."""
    if getproxies():
        return  # the proxy looks names up, not this machine
    for host in sorted({urlsplit(url).hostname or "" for url in builder.url_infos}):
        try:
            socket.getaddrinfo(host, 443)
        except OSError as error:
            raise OSError(f"{host} cannot be reached ({error.strerror or error})") from None


def _import_tfds() -> Any:
    # absl and urllib3 warn of what our users can do nothing about (no OpenCV, each retry).
    for noisy in ("absl", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    import tensorflow_datasets

    return tensorflow_datasets


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _decode(builder: Any, folder: Path) -> Pool:
    image, label = _features(builder)
    splits = [split for split in ("train", "test") if split in builder.info.splits]
    if "train" not in splits:
        raise UserError(f"{builder.name} has no train split, so nothing to poison")
    arrays: dict[str, np.ndarray] = {}
    total = sum(builder.info.splits[split].num_examples for split in splits)
    with Progress(f"decoding {builder.name}", total) as progress:
        for split in splits:
            prefix = "test_" if split == "test" else ""
            images, labels = _read_split(builder, split, image, label, progress)
            arrays |= {f"{prefix}images": images, f"{prefix}labels": labels}
    names = tuple(builder.info.features[label].names)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.json").unlink(missing_ok=True)
    for name, array in arrays.items():
        with replacing(folder / f"{name}.npy") as temporary:
            np.save(temporary, array, allow_pickle=False)
    source = Path(builder.data_path)
    index = {
        "source": str(source), "files": _stamps(source),
        "arrays": sorted(arrays), "class_names": names,
    }  # fmt: skip
    write_text(folder / "index.json", json.dumps(index, indent=1))
    test = (arrays["test_images"], arrays["test_labels"]) if "test_images" in arrays else None
    return Pool(arrays["images"], arrays["labels"], names, test)


def _features(builder: Any) -> tuple[str, str]:
    """Names of the image and the label of an image-classification set."""
    import tensorflow_datasets as tfds

    keys = builder.info.supervised_keys
    features = builder.info.features
    if keys is None or len(keys) != 2:
        raise UserError(f"TFDS set {builder.name} names no image and label; choose another")
    image, label = keys
    fits = isinstance(features[image], tfds.features.Image)
    if not fits or not isinstance(features[label], tfds.features.ClassLabel):
        raise UserError(f"TFDS set {builder.name} is not an image-classification set; choose another")
    if np.dtype(features[image].np_dtype) != np.uint8:
        raise UserError(f"the images of TFDS set {builder.name} are not of 8 bits; choose another")
    if None in features[image].shape[:2]:
        raise UserError(
            f"the images of TFDS set {builder.name} differ in size, which is not supported; choose"
            " a set with images of one size"
        )
    return image, label


def _read_split(
    builder: Any, split: str, image: str, label: str, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    with contextlib.redirect_stdout(sys.stderr):
        try:
            source = builder.as_data_source(split=split)
            images = np.empty((len(source), *builder.info.features[image].shape), np.uint8)
            labels = np.empty(len(source), np.int32)
            for i, example in enumerate(source):
                images[i], labels[i] = example[image], example[label]
                progress.advance()
        except Exception as error:  # whatever a damaged file makes the readers raise
            raise UserError(
                f"cannot read {builder.name} from {builder.data_path}: {_first_line(error)}; prepare"
                " it again, with file_format='array_record'"
            ) from None
    return images, labels
