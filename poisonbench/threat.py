"""What an attacker may change, and the proof that no more was changed.

A `Budget` is a rule and a `PoisonSet` is what an attack made under it: the only thing that is ever
scored, after it went through a file. `PoisonSet.load` trusts nothing: the file may come from a
stranger, so it is safetensors (no code), and everything it says is checked before it is used.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from poisonbench._files import content_hash, replacing
from poisonbench.errors import UserError, plain

Labels = Literal["fixed", "free"]
Mode = Literal["replace", "add"]
FORMAT = "poisonbench-poison-1"
MAX_FILE_BYTES = 2**30
MAX_HEADER_BYTES = 2**20


class Box(BaseModel):
    """Pixels may take any 8-bit value."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["box"] = "box"

    def __str__(self) -> str:
        return "any pixels"


class LInf(BaseModel):
    """Pixels may move by at most `radius` 8-bit levels from the original's."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["linf"] = "linf"
    radius: int = Field(ge=1, le=255)

    def __str__(self) -> str:
        return f"pixels within {self.radius}/255"


class Budget(BaseModel):
    """What the attacker may change.

    Attributes:
        fraction: share of the whole training set that may be poisoned, in (0, 1), rounded down
            to whole images; 1 where pixels stay within a radius or poison is added. The set is the
            victim's as it would be without the attack, in both modes.
        mode: `replace` puts poison in the place of clean images; `add` puts it beside them, each
            bound to a clean image that it departs from: its label and its radius are that one's.
            The set is longer then, so a poisoned victim and its clean twin share initialisation
            and seeds but no order of images, and may differ by some steps.
        pixels: which pixel values a poisoned image may have.
        labels: `fixed` keeps each image's label; `free` allows any class.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    fraction: float = Field(gt=0, le=1, allow_inf_nan=False)
    mode: Mode = "replace"
    pixels: Annotated[Box | LInf, Field(discriminator="kind")] = Box()
    labels: Labels = "fixed"

    @model_validator(mode="after")
    def _leaves_data(self) -> Budget:
        if self.fraction == 1 and isinstance(self.pixels, Box) and self.mode == "replace":
            raise ValueError("a fraction of 1 needs a radius")
        return self

    def count(self, num_train: int) -> int:
        """How many images may be poisoned.

        Raises:
            UserError: not even one.
        """
        # The tolerance keeps 0.07 of 100 at 7, where floating point makes it 7.000000000000001
        # or, elsewhere, 6.999999999999999.
        count = int(self.fraction * num_train + 1e-9)
        if count < 1:
            raise UserError(
                f"a fraction of {self.fraction:g} selects no image of {num_train}: use at least"
                f" {1 / num_train:.3g}"
            )
        return count

    @property
    def can_flip(self) -> bool:
        """Whether wrong labels can be had, as such or by copies in places of other classes."""
        return self.labels == "free" or isinstance(self.pixels, Box)

    def game(self) -> str:
        """The rules in words; attacks under different ones are never ranked together."""
        return f"{self.mode}, {self.labels} labels, {self.pixels}, {self.fraction:.4g} of the set"


def make_budget(
    fraction: float, labels: str, radius: int | None = None, mode: str = "replace"
) -> Budget:
    """A budget from what a user typed.

    Raises:
        UserError: a value out of its range.
    """
    if not 0 < fraction < 1 and not (fraction == 1 and (radius is not None or mode == "add")):
        raise UserError(
            "--fraction must lie strictly between 0 and 1 (1 itself with --radius or"
            f" --mode add), not {fraction:g}"
        )
    if labels not in ("fixed", "free"):
        raise UserError(f"--labels must be 'fixed' or 'free', not '{labels}'")
    if mode not in ("replace", "add"):
        raise UserError(f"--mode must be 'replace' or 'add', not '{mode}'")
    if radius is not None and not 1 <= radius <= 255:
        raise UserError(f"--radius is in 8-bit levels, from 1 to 255, not {radius}")
    pixels = Box() if radius is None else LInf(radius=radius)
    return Budget(
        fraction=fraction,
        mode="replace" if mode == "replace" else "add",
        labels="fixed" if labels == "fixed" else "free",
        pixels=pixels,
    )


@dataclass(frozen=True)
class PoisonSet:
    """A poison: which training images it replaces or stands beside, and by what.

    Attributes:
        indices: `[p]`, int64, into the training set; no two alike. What replaces these images or,
            where the budget adds, departs from them.
        images: `[p, height, width, channels]`, uint8.
        labels: `[p]`, int32.
        budget: the rule it was made under.
        train_hash: content hash of the training set it was made for.
    """

    indices: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    budget: Budget
    train_hash: str

    @property
    def hash(self) -> str:
        """Content hash over indices, images and labels, and over budget and training set."""
        rule = f"{self.budget.model_dump_json()}{self.train_hash}".encode()
        return content_hash(self.indices, self.images, self.labels, np.frombuffer(rule, np.uint8))

    def __len__(self) -> int:
        return len(self.indices)

    def save(self, path: Path) -> None:
        """Write the set as safetensors; the same set gives the same bytes."""
        header = {
            "format": FORMAT,
            "budget": self.budget.model_dump_json(),
            "train_hash": self.train_hash,
            "hash": self.hash,
        }
        tensors = {
            "images": np.ascontiguousarray(self.images),
            "indices": np.ascontiguousarray(self.indices),
            "labels": np.ascontiguousarray(self.labels),
        }
        # One metadata entry, since the order of several is not fixed in the file.
        with replacing(path) as temporary:
            temporary.write_bytes(save(tensors, {"poisonbench": json.dumps(header, sort_keys=True)}))

    @staticmethod
    def load(path: Path) -> PoisonSet:
        """Read a file that anybody may have made.

        Raises:
            UserError: it is missing, truncated, oversized or no safetensors; lacks a field or has
                others; holds the wrong dtypes or ranks, repeated indices, or a wrong hash.
        """
        tensors, header = _read(path)
        try:
            budget = Budget.model_validate_json(str(header.get("budget")))
        except ValidationError as error:
            problem = error.errors()[0]
            where = plain(".".join(map(str, problem["loc"])), 100) or "budget"
            raise _bad(path, f"its budget is not valid ({where}: {problem['msg']})") from None
        train_hash = header.get("train_hash")
        if not (isinstance(train_hash, str) and re.fullmatch("[0-9a-f]{64}", train_hash)):
            raise _bad(path, "it does not name the training set by its hash")
        for name, (dtype, rank) in _TENSORS.items():
            tensor = tensors[name]
            if tensor.dtype != dtype or tensor.ndim != rank:
                raise _bad(
                    path,
                    f"'{name}' is {tensor.dtype} of rank {tensor.ndim}, not"
                    f" {np.dtype(dtype).name} of rank {rank}",
                )
        poison = PoisonSet(
            tensors["indices"], tensors["images"], tensors["labels"], budget,
            train_hash,
        )  # fmt: skip
        if not len(poison.indices) == len(poison.images) == len(poison.labels):
            raise _bad(path, "indices, images and labels differ in number")
        if len(np.unique(poison.indices)) != len(poison):
            raise _bad(path, "an index is repeated")
        if header.get("hash") != poison.hash:
            raise _bad(path, "its content does not have the hash it states")
        return poison

    def check(self, train_images: np.ndarray, train_labels: np.ndarray, num_classes: int) -> None:
        """Hold the set against its budget and the training set it claims to poison.

        Args:
            train_images: `[n, height, width, channels]`, uint8, clean.
            train_labels: `[n]`, clean.
            num_classes: labels must lie below.

        Raises:
            UserError: it was made for other data, or changes more than it may.
        """
        if self.train_hash != content_hash(train_images, train_labels):
            raise UserError(
                "the poison was made for another training set: evaluate it with the --dataset,"
                " sizes and split it was crafted on"
            )
        allowed = self.budget.count(len(train_labels))
        if len(self) > allowed:
            raise UserError(f"the poison changes {len(self)} images; its budget allows {allowed}")
        if self.images.shape[1:] != train_images.shape[1:]:
            raise UserError(
                f"poisoned images have the shape {self.images.shape[1:]}; the data set's have"
                f" {train_images.shape[1:]}"
            )
        if len(np.unique(self.indices)) != len(self):
            raise UserError("the poison changes one image twice: an index is repeated")
        if len(self) and not 0 <= self.indices.min() <= self.indices.max() < len(train_labels):
            raise UserError(f"a poison index lies outside the {len(train_labels)} training images")
        if len(self) and not 0 <= self.labels.min() <= self.labels.max() < num_classes:
            raise UserError(f"a poison label lies outside the {num_classes} classes")
        if self.budget.labels == "fixed" and np.any(self.labels != train_labels[self.indices]):
            raise UserError("the poison changes labels, which its budget fixes")
        if isinstance(self.budget.pixels, LInf):
            moved = np.abs(self.images.astype(np.int16) - train_images[self.indices].astype(np.int16))
            if len(self) and moved.max() > self.budget.pixels.radius:
                raise UserError(
                    f"the poison moves a pixel by {moved.max()} levels; its budget allows"
                    f" {self.budget.pixels.radius}"
                )

    def where(self, number: int) -> np.ndarray:
        """Which images of the poisoned set are poison, bool, given how many clean ones there were."""
        if self.budget.mode == "add":
            return np.arange(number + len(self)) >= number
        poisoned = np.zeros(number, bool)
        poisoned[self.indices] = True
        return poisoned

    def apply(self, train_images: np.ndarray, train_labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The poisoned training set, as new arrays."""
        images, labels = train_images.copy(), np.array(train_labels, np.int32)
        if self.budget.mode == "add":
            return np.concatenate([images, self.images]), np.concatenate([labels, self.labels])
        images[self.indices], labels[self.indices] = self.images, self.labels
        return images, labels


_TENSORS = {"images": (np.uint8, 4), "indices": (np.int64, 1), "labels": (np.int32, 1)}


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise UserError(f"cannot read {path}: it is no file")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise _bad(path, f"it has {size} bytes, more than the {MAX_FILE_BYTES} allowed")
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") > MAX_HEADER_BYTES:
                raise _bad(path, "its header is too long or it is no safetensors file")
        with safe_open(path, framework="numpy") as file:
            if (names := set(file.keys())) != set(_TENSORS):
                raise _bad(path, f"it holds {plain(str(sorted(names)), 200)}, not {sorted(_TENSORS)}")
            header = json.loads((file.metadata() or {}).get("poisonbench", "{}"))
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (SafetensorError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise _bad(path, f"it is truncated or no safetensors file ({plain(str(error), 200)})") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise _bad(path, f"its format is not {FORMAT}")
    return tensors, header


def _bad(path: Path, why: str) -> UserError:
    return UserError(f"{path} is not a valid poison file: {why}; craft it again or ask its author")
