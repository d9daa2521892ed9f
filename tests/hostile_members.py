"""Bundles whose manifest, record or poison is not what it should be: see `test_hostile_bundles`."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import bundles
import numpy as np
from hostile_archives import Change, Payload
from safetensors.numpy import save

from poisonbench._files import content_hash
from poisonbench.threat import Budget, LInf


def said(**changes: Any) -> Change:
    """A bundle whose manifest says something else."""
    return lambda: bundles.bundle(**changes)


def written(manifest: bytes) -> Change:
    """A bundle with these bytes for its manifest."""
    return lambda: bundles.archive(list((bundles.members() | {"manifest.json": manifest}).items()))


def file_said(**changes: Any) -> Change:
    """A bundle whose manifest lists its poison otherwise."""

    def spoilt() -> bytes:
        contents = bundles.members()
        files = json.loads(contents["manifest.json"])["files"]
        files["poison.safetensors"] |= changes
        return bundles.bundle(files=files)

    return spoilt


def changed(name: str, edit: Callable[[bytes], bytes]) -> Change:
    """A bundle of which one member is changed behind the manifest's back."""

    def spoilt() -> bytes:
        contents = bundles.members()
        return bundles.archive(list((contents | {name: edit(contents[name])}).items()))

    return spoilt


def claimed(*path: str | int, to: object) -> Change:
    """A bundle whose record says something else, `...` leaving a field out; its hashes are right."""

    def spoilt() -> bytes:
        stated: Any = json.loads(bundles.record(bundles.poison()).model_dump_json())
        where = stated
        for step in path[:-1]:
            where = where[step]
        if to is ...:
            del where[path[-1]]
        else:
            where[path[-1]] = to
        return bundles.bundle(None, json.dumps(stated).encode())

    return spoilt


def recorded(text: bytes) -> Change:
    """A bundle with these bytes for its record."""
    return lambda: bundles.bundle(None, text)


def poisoned(**changes: Any) -> Change:
    """A bundle of another poison, whose own hash and record are right."""
    return lambda: bundles.bundle(bundles.poison(**changes))


def stored(make: Callable[[], bytes]) -> Change:
    """A bundle with these bytes for its poison file."""
    return lambda: bundles.bundle(make())


def tensors(**changes: Any) -> Change:
    """A bundle whose poison file has other tensors, with a header that has the right hash."""

    def make() -> bytes:
        made = bundles.poison()
        arrays = {"images": made.images, "indices": made.indices, "labels": made.labels}
        arrays = {name: array for name, array in (arrays | changes).items() if array is not None}
        rule = f"{made.budget.model_dump_json()}{made.train_hash}".encode()
        parts = [arrays[n] for n in ("indices", "images", "labels") if n in arrays]
        header = {
            "format": "poisonbench-poison-1", "budget": made.budget.model_dump_json(),
            "train_hash": made.train_hash, "hash": content_hash(*parts, np.frombuffer(rule, np.uint8)),
        }  # fmt: skip
        return save(arrays, {"poisonbench": json.dumps(header)})

    return stored(make)


def handmade(entries: dict[str, Any], data: bytes, length: int | None = None) -> Change:
    """A bundle whose poison file has a header that says anything."""
    header = json.dumps(entries).encode()
    size = len(header) if length is None else length
    return stored(lambda: size.to_bytes(8, "little") + header + data)


def tensor(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def pixels() -> np.ndarray:
    return bundles.poison().images


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def too_many() -> bytes:
    """Ten images under a budget of five, in a record that does not say so."""
    made = bundles.poison()
    small = replace(made, budget=Budget(fraction=0.05))
    stated: Any = json.loads(bundles.record(made).model_dump_json())
    stated |= {"budget": json.loads(small.budget.model_dump_json()), "poison_hash": small.hash}
    return bundles.bundle(small, json.dumps(stated).encode())


DEEP = b"[" * 60_000
ROWS = np.arange(0, 100, 10, dtype=np.int64)

NOT_A_MANIFEST = "manifest.json is not a valid manifest"
MANIFESTS: dict[str, tuple[Change, str]] = {
    "a manifest that is empty": (written(b""), NOT_A_MANIFEST),
    "a manifest that is no JSON": (written(b"name: theirs"), NOT_A_MANIFEST),
    "a manifest that is a pickle": (written(pickle.dumps(Payload())), NOT_A_MANIFEST),
    "a manifest in UTF-16": (written("{}".encode("utf-16")), NOT_A_MANIFEST),
    "a manifest that is a list": (written(b"[]"), NOT_A_MANIFEST),
    "a manifest without end": (written(DEEP), NOT_A_MANIFEST),
    "a manifest with half a character": (said(title="\ud800"), NOT_A_MANIFEST),
    "a manifest of megabytes": (said(description="x" * 2**21), "manifest.json has 2097"),
    "an unknown field": (said(command="rm -rf /"), "command: Extra inputs"),
    "an unknown field with escape sequences": (said(**{"\x1b[2J" * 1000: 1}), "Extra inputs"),
    "another schema": (said(schema_version=2), "schema_version"),
    "HTML in the name": (said(name="<script>alert(1)</script>"), "name: String should match"),
    "Markdown in the name": (said(name="[mgd](https://example.org)"), "name: String should match"),
    "a path in the name": (said(name="../../results"), "name: String should match"),
    "a name of 65 letters": (said(name="x" * 65), "name: String should match"),
    "a name with a line end": (said(name="theirs\n"), "name: String should match"),
    "another name than the record's": (said(name="mine"), "names mine and its record theirs"),
    "HTML in the title": (said(title="<img src=x onerror=alert(1)>"), "title: .*without HTML"),
    "HTML in the description": (said(description="a\n<script>"), "description: .*without HTML"),
    "Markdown in the description": (said(description="![x](http://a.b)"), "description: .*Markdown"),
    "escape sequences in the title": (said(title="\x1b[31mTheirs"), "title: .*control"),
    "text that turns round": (said(authors=["Ada \u202eecalevoL"]), "authors.0: .*control"),
    "zeros in the description": (said(description="a\0b"), "description: .*control"),
    "a description that is too long": (said(description="x" * 2001), "description: .*2000"),
    "BibTeX that is none": (said(bibtex="<script>alert(1)</script>"), "bibtex"),
    "an address that is a program": (said(paper="javascript:alert(1)"), "paper"),
    "an address that leaves its quotes": (said(code='https://a.b/" onclick="x'), "code"),
    "an address of a file": (said(code="file:///etc/passwd"), "code"),
    "a licence that is a text": (said(licence="MIT <b>"), "licence"),
    "no authors": (said(authors=[]), "authors"),
    "a thousand authors": (said(authors=["A"] * 1000), "authors"),
    "an author that is a number": (said(authors=[1]), "authors.0"),
    "a file that is not listed": (said(files={}), "files"),
    "a file too many": (
        said(files={n: {"size": 1, "sha256": "0" * 64} for n in (*bundles.MEMBERS, "../x")}), "files",
    ),
    "a hash that is wrong": (file_said(sha256="0" * 64), "is not the file that its manifest lists"),
    "a hash that is none": (file_said(sha256="none"), "sha256"),
    "a size that is wrong": (file_said(size=1), "is not the file that its manifest lists"),
    "a size below zero": (file_said(size=-1), "size"),
    "a size that is a word": (file_said(size="1"), "size"),
    "a size of a thousand digits": (file_said(size=10**1000), "size|is not the file"),
    **{
        f"a manifest without {field}": (said(**{field: None}), f"{field}: Field required")
        for field in json.loads(bundles.manifest({}))
    },
}  # fmt: skip

NOT_A_RECORD = "record.json is not a valid record"
RECORDS: dict[str, tuple[Change, str]] = {
    "a record that was changed": (
        changed("record.json", lambda text: text.replace(b"91.0", b"81.0")), "is not the file that its",
    ),
    "a record that is no JSON": (recorded(b"\x80\x04"), NOT_A_RECORD),
    "a record without end": (recorded(b'{"attack_config": ' + DEEP), NOT_A_RECORD),
    "a record of two megabytes": (recorded(b" " * 2**21), "record.json has 2097152 bytes"),
    "a record with an unknown field": (claimed("more", to=1), "more: Extra"),
    "a record without a field": (claimed("budget", to=...), "budget: Field required"),
    "a record of the future": (claimed("schema_version", to=2), "schema_version"),
    "accuracy of 101 %": (claimed("victims", 0, "clean", 0, to=101.0), "victims.0.clean.0"),
    "accuracy that is no number": (claimed("victims", 0, "clean", 0, to=float("nan")), NOT_A_RECORD),
    "accuracy in a text": (claimed("victims", 0, "poisoned", 3, to="1"), "victims.0.poisoned.3"),
    "a repeated seed": (claimed("victims", 0, "seeds", to=[0] * 10), "a seed is repeated"),
    "a seed beyond all numbers": (claimed("victims", 0, "seeds", 0, to=10**400), "seeds"),
    "images beyond all numbers": (claimed("num_train", to=10**400), "num_train"),
    "a cost beyond all numbers": (claimed("crafting_seconds", to=1e300), "crafting_seconds"),
    "a date at the end of time": (claimed("created", to="9999-12-31T23:59:59-23:00"), "created"),
    "a date at the beginning": (claimed("created", to="0001-01-01T00:00:00+23:00"), "created"),
    "a command of megabytes": (claimed("command", to="x" * 500_000), "command"),
    "a remark of megabytes": (claimed("remark", to="x" * 500_000), "remark"),
    "ten thousand libraries": (
        claimed("libraries", to={str(i): "1" for i in range(10_000)}), "libraries",
    ),
    "HTML in the attack's name": (claimed("attack", to="<b>mgd</b>"), "attack: String should match"),
    "a path in the attack's name": (claimed("attack", to="../../x"), "attack: String should match"),
    "a path in the track's name": (claimed("track", to="../../x"), "track: String should match"),
    "a track that is not there": (claimed("track", to="digit"), "no track called 'digit'"),
    "a custom run": (claimed("custom", to=["seeds"]), "is custom"),
    "a custom run that does not say so": (claimed("victims", 0, "recipe", "epochs", to=9), "is custom"),
    "another test set": (claimed("hashes", "test", to="0" * 64), "about other data"),
    "another number of images": (claimed("num_train", to=101), "about other data"),
    "defended victims": (claimed("defense", to="mixup"), "defended by mixup"),
    "the record of another poison": (claimed("poison_hash", to="0" * 64), "another poison"),
    "the record of another budget": (claimed("budget", "labels", to="free"), "states another budget"),
    "a marked record": (
        lambda: bundles.bundle(None, bundles.record(bundles.poison(), status="invalid", remark="x")),
        "marked invalid",
    ),
    "the name of an attack": (
        lambda: bundles.bundle(None, bundles.record(bundles.poison(), attack="mgd"), name="mgd"),
        "is that of the attack mgd",
    ),
    "a name that looks like an attack's": (
        lambda: bundles.bundle(
            None, bundles.record(bundles.poison(), attack="Label-Flip"), name="Label-Flip"
        ),
        "is that of the attack label_flip",
    ),
}  # fmt: skip

NOT_A_POISON = "poison.safetensors is not a valid poison file"
POISONS: dict[str, tuple[Change, str]] = {
    "a poison that was changed": (
        changed("poison.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        "is not the file that its manifest lists",
    ),
    "a pickled poison": (stored(lambda: pickle.dumps(Payload())), NOT_A_POISON),
    "an array of NumPy's with a pickle": (
        stored(lambda: npy(np.array([Payload()], dtype=object))), NOT_A_POISON,
    ),
    "an empty poison file": (stored(lambda: b""), NOT_A_POISON),
    "a poison file cut off": (stored(lambda: bundles.stored(bundles.poison())[:-1]), NOT_A_POISON),
    "a poison file that goes on": (
        stored(lambda: bundles.stored(bundles.poison()) + b"\0"), NOT_A_POISON,
    ),
    "a header of 2**60 bytes": (handmade({}, b"", 2**60), "header is too long"),
    "a header beyond the end": (handmade({}, b"", 10_000), NOT_A_POISON),
    "a header without end": (stored(lambda: len(DEEP).to_bytes(8, "little") + DEEP), NOT_A_POISON),
    "a shape beyond all memory": (
        handmade({"images": tensor("U8", [2**40, 2**20, 2**20, 1], 0, 4)}, bytes(4)), NOT_A_POISON,
    ),
    "a shape of nothing, endless": (
        handmade(
            {
                "images": tensor("U8", [2**62, 0, 1, 1], 0, 0), "indices": tensor("I64", [0], 0, 0),
                "labels": tensor("I32", [0], 0, 0),
            },
            b"",
        ),
        NOT_A_POISON,
    ),
    "offsets that overlap": (
        handmade({"indices": tensor("I64", [1], 0, 8), "labels": tensor("I32", [2], 0, 8)}, bytes(8)),
        NOT_A_POISON,
    ),
    "a tensor too many": (tensors(**{"\x1b[2J<b>": np.zeros(3)}), "it holds"),
    "a tensor too few": (tensors(labels=None), "it holds"),
    "pixels that are no numbers": (
        lambda: tensors(images=np.full(pixels().shape, np.nan, np.float32))(), "'images' is float32",
    ),
    "pixels of 64 bits": (lambda: tensors(images=pixels().astype(np.int64))(), "'images' is int64"),
    "images without channels": (lambda: tensors(images=pixels()[..., 0])(), "of rank 3"),
    "labels that are floats": (tensors(labels=np.zeros(10, np.float32)), "'labels' is float32"),
    "one label fewer": (tensors(labels=np.zeros(9, np.int32)), "differ in number"),
    "a repeated index": (tensors(indices=np.zeros(10, np.int64)), "an index is repeated"),
    "no hash": (stored(lambda: save({"images": pixels()}, {})), NOT_A_POISON),
    "an index out of range": (poisoned(indices=ROWS + 10), "lies outside the 100 training images"),
    "an index below zero": (poisoned(indices=ROWS - 1), "lies outside the 100 training images"),
    "an index beyond all memory": (poisoned(indices=ROWS + 2**62), "lies outside"),
    "a label that is no class": (
        poisoned(labels=np.full(10, 10, np.int32), budget=Budget(fraction=0.1, labels="free")),
        "lies outside the 10 classes",
    ),
    "labels that are fixed": (
        lambda: poisoned(labels=(bundles.poison().labels + 1) % 10)(), "changes labels",
    ),
    "images of another size": (
        lambda: poisoned(images=np.zeros((10, 16, 16, 1), np.uint8))(), "have the shape",
    ),
    "pixels beyond the radius": (
        poisoned(budget=Budget(fraction=0.1, pixels=LInf(radius=8))), "moves a pixel by",
    ),
    "the poison of other data": (
        lambda: bundles.bundle(
            (made := bundles.poison(train_hash="0" * 64)),
            bundles.record(made, hashes=bundles.dataset().hashes() | {"train": "0" * 64}),
        ),
        "about other data",
    ),
    "more images than the budget has": (
        lambda: too_many(), "more images are poisoned than the budget allows",
    ),
}  # fmt: skip
