"""Good bundles, made without training, for tests to submit, verify and spoil."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from poisonbench import tracks
from poisonbench._files import content_hash
from poisonbench.data import Dataset, DataSpec, load
from poisonbench.records import Record, VictimScores
from poisonbench.stored import Hardware
from poisonbench.threat import Budget, PoisonSet
from poisonbench.tracks import DIGITS

SPEC = DataSpec(name="digits", train_size=100, val_size=50, test_size=600)
SMALL = {
    name: r.replace(network="cnn", width=2, epochs=1, batch_size=50)
    for name, r in DIGITS.recipes.items()
}
MEMBERS = ("manifest.json", "record.json", "poison.safetensors")


@cache
def dataset() -> Dataset:
    """A hundred digits."""
    return load(SPEC)


def shrink(monkeypatch: pytest.MonkeyPatch, seeds: int = 10) -> None:
    """The digits track at a size at which a test can train its victims."""
    tiny = replace(
        DIGITS, dataset=SPEC, budget=Budget(fraction=0.1), recipes=MappingProxyType(SMALL), seeds=seeds
    )
    monkeypatch.setattr(tracks, "TRACKS", MappingProxyType({"digits": tiny}))


def poison(**changes: Any) -> PoisonSet:
    """Black images in place of ten of a hundred digits."""
    data = dataset()
    rows = np.arange(0, 100, 10)
    made = PoisonSet(
        rows.astype(np.int64),
        np.zeros_like(data.train_images[rows]),
        data.train_labels[rows],
        Budget(fraction=0.1),
        content_hash(data.train_images, data.train_labels),
    )
    return replace(made, **changes)


def scores(recipe: str, seeds: list[int], drops: list[float]) -> VictimScores:
    """Victims that lose these points from 95 %."""
    poisoned = [round(95 - drop, 6) for drop in drops]
    return VictimScores(
        recipe_name=recipe, recipe=SMALL[recipe].as_dict(), seeds=seeds, clean=[95.0] * len(seeds),
        poisoned=poisoned, clean_best=[96.0] * len(seeds), poisoned_best=poisoned,
    )  # fmt: skip


def record(made: PoisonSet, drops: list[float] | None = None, **changes: Any) -> Record:
    """A claim of these drops, on both recipes."""
    drops = drops or [3.0, 4.0] * 5
    values: dict[str, Any] = {
        "track": "digits", "attack": "theirs", "attack_config": {}, "attack_seed": 0,
        "dataset": SPEC, "hashes": dataset().hashes(), "budget": made.budget, "num_train": 100,
        "num_poison": len(made), "surrogate": "smooth",
        "victims": [scores(name, list(range(len(drops))), drops) for name in SMALL],
        "poison_hash": made.hash, "crafting_seconds": None, "evaluation_seconds": 80.25,
        "created": datetime(2026, 3, 1, 12, 30, tzinfo=UTC), "command": "poisonbench evaluate …",
        "code": {"version": "0.1.0", "commit": None, "dirty": None}, "libraries": {"numpy": "2.0.0"},
        "hardware": Hardware(system="Linux", processor="any", cores=2, device="cpu: cpu"),
    }  # fmt: skip
    return Record(**values | changes)


def run_folder(folder: Path, made: PoisonSet | None = None, **changes: Any) -> Path:
    """A finished run, as far as a bundle takes it in."""
    made = made or poison()
    made.save(folder / "poison.safetensors")
    record(made, **changes).save(folder / "record.json")
    return folder


def manifest(contents: dict[str, bytes], **changes: Any) -> bytes:
    """The manifest of these members; a change to None leaves a field out, `...` makes it null."""
    said: dict[str, Any] = {
        "schema_version": 1, "name": "theirs", "title": "Theirs", "authors": ["Ada Lovelace"],
        "description": "Black images.", "paper": "https://example.org/a?b=1",
        "bibtex": "@misc{a, year={1}}", "code": None, "licence": "MIT",
        "files": {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in contents.items()
        },
    }  # fmt: skip
    given = {name: None if value is ... else value for name, value in changes.items()}
    left_out = [name for name, value in changes.items() if value is None]
    return json.dumps({n: v for n, v in (said | given).items() if n not in left_out}).encode()


def members(
    made: PoisonSet | bytes | None = None, claim: Record | bytes | None = None, **changes: Any
) -> dict[str, bytes]:
    """The members of a bundle, whose manifest lists them as they are; `changes` are to the manifest."""
    made = poison() if made is None else made
    if isinstance(made, bytes):
        claim = record(poison()) if claim is None else claim
        data = made
    else:
        claim = record(made) if claim is None else claim
        data = stored(made)
    text = claim if isinstance(claim, bytes) else claim.model_dump_json(indent=1).encode()
    contents = {"record.json": text, "poison.safetensors": data}
    return {"manifest.json": manifest(contents, **changes), **contents}


def stored(made: PoisonSet) -> bytes:
    """The bytes of a poison file."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "poison.safetensors"
        made.save(path)
        return path.read_bytes()


def archive(contents: list[tuple[str, bytes]], **attributes: Any) -> bytes:
    """A zip archive of these members, stored; `attributes` are set on the last one."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for i, (name, data) in enumerate(contents):
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, 0o100644 << 16
            if i == len(contents) - 1:
                for attribute, value in attributes.items():
                    setattr(info, attribute, value)
            file.writestr(info, data)
    return buffer.getvalue()


def bundle(*arguments: Any, **changes: Any) -> bytes:
    """A bundle of `members`."""
    return archive(list(members(*arguments, **changes).items()))


def everything(folder: Path) -> list[Path]:
    """Every path below a folder."""
    return sorted(folder.rglob("*"))
