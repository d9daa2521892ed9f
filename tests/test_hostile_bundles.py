"""Bundles that mean harm, or are merely broken: every one is refused before it can do anything.

Each case is made from a good bundle by one change, with hashes and sizes made right again wherever that
is possible, so that only the named defect is left. Of each it is tested that its verification

- ends with a `UserError` of one printable line of bounded length that says what is wrong;
- trains no victim, writes nothing, be it among the results or among temporary files, and runs nothing;
- allocates less than 32 MiB, whatever the bundle promises.

At the command line that is exit code 2 and the line on standard error. The good bundle passes, so it is
not the reader that refuses everything. And a plugin that takes the name of an attack of ours is refused
without being imported.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest
from commandline import Run, refused
from safetensors.numpy import save

from poisonbench import _plugins, harness
from poisonbench._files import content_hash
from poisonbench.data import load
from poisonbench.errors import UserError
from poisonbench.submission import bundle, secret
from poisonbench.submission.verify import Maintainer, verify
from poisonbench.threat import Budget, LInf, PoisonSet

Change = Callable[[], bytes]
LIMIT = 2**25
CENTRAL, LOCAL = b"PK\1\2", b"PK\3\4"


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


@pytest.fixture(autouse=True)
def maintainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bundles.shrink(monkeypatch)
    monkeypatch.setenv("POISONBENCH_SECRET", str(tmp_path / "secret"))
    secret.create(tmp_path / "secret")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    load(bundles.SPEC)  # what is imported and kept on the first time is not the bundle's doing


def with_field(data: bytes, sign: bytes, which: int, offset: int, form: str, value: int) -> bytes:
    """The archive with one number changed in the header of a member, of the given kind."""
    start = -1
    for _ in range(which + 1):
        start = data.index(sign, start + 1)
    spoilt = bytearray(data)
    struct.pack_into(form, spoilt, start + offset, value)
    return bytes(spoilt)


def listed(which: int, offset: int, form: str, value: int) -> Change:
    """A change to the directory's entry of a member."""
    return lambda: with_field(bundles.bundle(), CENTRAL, which, offset, form, value)


def headed(which: int, offset: int, form: str, value: int) -> Change:
    """A change to a member's own header."""
    return lambda: with_field(bundles.bundle(), LOCAL, which, offset, form, value)


def resized(size: int) -> Change:
    """A bundle whose headers agree on another size of the poison."""

    def spoilt() -> bytes:
        data = bundles.bundle()
        for sign, offset in ((CENTRAL, 20), (CENTRAL, 24), (LOCAL, 18), (LOCAL, 22)):
            data = with_field(data, sign, 2, offset, "<L", size)
        return data

    return spoilt


def ended(offset: int, form: str, value: int) -> Change:
    """A change to the end of the directory."""

    def spoilt() -> bytes:
        data = bytearray(bundles.bundle())
        struct.pack_into(form, data, len(data) - 22 + offset, value)
        return bytes(data)

    return spoilt


def named(which: int, name: str) -> Change:
    """A bundle of which one member has another name, of which all lengths are right."""

    def spoilt() -> bytes:
        contents = list(bundles.members().items())
        contents[which] = (name, contents[which][1])
        return bundles.archive(contents)

    return spoilt


def more(name: str, data: bytes = b"more", **attributes: Any) -> Change:
    """A bundle with a fourth member."""
    return lambda: bundles.archive([*bundles.members().items(), (name, data)], **attributes)


def attributed(**attributes: Any) -> Change:
    """A bundle with something said of its last member."""
    return lambda: bundles.archive(list(bundles.members().items()), **attributes)


def compressed(method: int, data: bytes | None = None) -> Change:
    """A bundle whose poison is compressed."""

    def spoilt() -> bytes:
        contents, buffer = bundles.members(), io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            for name, content in contents.items():
                last = name == "poison.safetensors"
                kind = method if last else zipfile.ZIP_STORED
                file.writestr(zipfile.ZipInfo(name), data if last and data else content, kind)
        return buffer.getvalue()

    return spoilt


def quoted() -> bytes:
    """A bundle whose members are the same bytes: the directory says three times where the first is."""
    data = bundles.bundle()
    for which in (1, 2):
        data = with_field(data, CENTRAL, which, 42, "<L", 0)
    return data


def apart() -> bytes:
    """A bundle with bytes between its members and its directory, which the end accounts for."""
    data = bundles.bundle()
    start = data.index(CENTRAL)
    end = struct.pack("<L", start + 1000)
    return data[:start] + b"\0" * 1000 + data[start:-6] + end + data[-2:]


def sixty_four() -> bytes:
    """A bundle whose directory ends in what reads like the pointer to a 64-bit one, far away."""
    data = bundles.archive([*list(bundles.members().items())[:2], ("a", b"")])
    return data[:-42] + struct.pack("<4sLQL", b"PK\6\7", 0, 2**40, 1) + data[-22:]


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        link = tarfile.TarInfo("manifest.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    return buffer.getvalue()


def sparse() -> bytes:
    raise AssertionError("written by the test, since it has 2 GiB")


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


DEEP = b"[" * 60_000
ROWS = np.arange(0, 100, 10, dtype=np.int64)
NO_ZIP = "is no zip archive"
NOT_THESE = "not manifest.json, record.json, poison.safetensors"

ARCHIVES: dict[str, tuple[Change, str]] = {
    "empty": (lambda: b"", NO_ZIP),
    "random bytes": (lambda: np.random.default_rng(0).bytes(5000), NO_ZIP),
    "a pickle": (lambda: pickle.dumps(Payload()), NO_ZIP),
    "a pickle as PyTorch stores it": (
        lambda: bundles.archive([("archive/data.pkl", pickle.dumps(Payload()))]), NOT_THESE,
    ),
    "a tar with a link": (tarred, NO_ZIP),
    "a gzip bomb": (lambda: gzip.compress(bytes(2**24)), NO_ZIP),
    "cut in half": (lambda: bundles.bundle()[: len(bundles.bundle()) // 2], NO_ZIP),
    "one byte short": (lambda: bundles.bundle()[:-1], NO_ZIP),
    "one byte over": (lambda: bundles.bundle() + b"\0", NO_ZIP),
    "a program before it": (lambda: b"#!/bin/sh\n" + bundles.bundle(), "is not where, or not what"),
    "beyond all limits": (sparse, "more than the"),
    "an archive's comment": (lambda: bundles.bundle()[:-2] + b"\4\0abcd", NO_ZIP),
    "a comment that is promised": (ended(20, "<H", 9), NO_ZIP),
    "a second part": (ended(4, "<H", 1), "of more than one part"),
    "a 64-bit directory": (sixty_four, "64-bit kind"),
    "a directory of 4 GiB": (ended(12, "<L", 2**32 - 1), "lists 3 files in 4294967295 bytes"),
    "a directory beyond the end": (ended(16, "<L", 2**31), "is not a valid bundle"),
    "more files than there are": (
        lambda: ended(8, "<H", 65535)()[:-12] + b"\xff\xff" + bundles.bundle()[-10:],
        "lists 65535 files",
    ),
    "thousands of files": (
        lambda: bundles.archive([(f"{i}.json", b"") for i in range(5000)]), "lists 5000 files",
    ),
    "no files": (lambda: bundles.archive([]), "lists 0 files"),
    "a record that is missing": (
        lambda: bundles.archive([p for p in bundles.members().items() if p[0] != "record.json"]),
        "lists 2 files",
    ),
    "a fourth file": (more("picture.png"), "lists 4 files"),
    "a path that leads out": (more("../../executed"), "lists 4 files"),
    "a path that leads out, instead of a file": (named(2, "../../executed.safetensor"), NOT_THESE),
    "a path from the root": (named(1, "/etc/cron.d/job"), NOT_THESE),
    "a path of Windows": (named(1, "..\\..\\record.json"), NOT_THESE),
    "a path with a drive": (named(1, "C:record.json"), NOT_THESE),
    "a folder before the name": (named(0, "theirs/manifest.json"), NOT_THESE),
    "a name in capitals": (named(0, "MANIFEST.JSON"), NOT_THESE),
    "a name with escape sequences": (named(0, "\x1b]0;owned\x07"), NOT_THESE),
    "a name that goes on after a zero": (
        lambda: named(1, "record.json~.sh")().replace(b"~", b"\0"), "is not where, or not what",
    ),
    "a name in another alphabet": (named(1, "rеcord.json"), NOT_THESE),  # a Cyrillic letter
    "a file twice": (
        lambda: named(1, "manifest.jso~")().replace(b"manifest.jso~", b"manifest.json"), NOT_THESE,
    ),
    "another order": (lambda: bundles.archive(list(bundles.members().items())[::-1]), NOT_THESE),
    "a symbolic link": (attributed(external_attr=0o120777 << 16), "is a link or a folder"),
    "a folder": (attributed(external_attr=0o40755 << 16), "is a link or a folder"),
    "a folder of DOS": (attributed(external_attr=0x10), "is a link or a folder"),
    "a device": (attributed(external_attr=0o20666 << 16), "is a link or a folder"),
    "an encrypted file": (listed(2, 8, "<H", 1), "is encrypted"),
    "a file that its own header calls encrypted": (headed(2, 6, "<H", 1), "is not where, or not what"),
    "a file that its own header calls shorter": (headed(2, 22, "<L", 9), "is not where, or not what"),
    "a bomb": (compressed(zipfile.ZIP_DEFLATED, bytes(2**24)), "is compressed"),
    "a bomb of bzip2": (compressed(zipfile.ZIP_BZIP2, bytes(2**24)), "is compressed"),
    "a bomb of LZMA": (compressed(zipfile.ZIP_LZMA, bytes(2**24)), "is compressed"),
    "a method that nobody knows": (listed(2, 10, "<H", 77), "is compressed"),
    "a size beyond what is there": (resized(2**28), "bytes that belong"),
    "a size beyond the limit": (resized(2**31), "more than the"),
    "a size below what is there": (resized(10), "bytes that belong"),
    "two sizes": (listed(2, 24, "<L", 2**27), "is compressed"),
    "an extra field": (attributed(extra=b"\x55\x54\x05\x00\x01abcd"), "extra fields"),
    "an extra field in a file's own header": (headed(1, 28, "<H", 4), "is not where, or not what"),
    "a file's comment": (attributed(comment=b"<script>"), "comments"),
    "a size that comes later": (listed(1, 8, "<H", 8), "has flags"),
    "files that share bytes": (quoted, "is not where, or not what"),
    "bytes between the files": (apart, "bytes that belong"),
    "a checksum that is wrong": (
        lambda: with_field(listed(2, 16, "<L", 12345)(), LOCAL, 2, 14, "<L", 12345), "CRC",
    ),
    "two checksums": (listed(2, 16, "<L", 12345), "is not where, or not what"),
}  # fmt: skip

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

CASES = ARCHIVES | MANIFESTS | RECORDS | POISONS


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


def test_there_are_enough() -> None:
    groups = (ARCHIVES, MANIFESTS, RECORDS, POISONS)
    assert len(CASES) == sum(len(group) for group in groups) > 40


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_in_one_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "evaluate", lambda *_, **__: pytest.fail("victims were trained"))
    monkeypatch.chdir(tmp_path)
    by = Maintainer(bytes(32), Path("results"), Path("runs"), None, "poisonbench verify")
    make, hint = CASES[case]
    path = tmp_path / "theirs.zip"
    if case == "beyond all limits":
        with path.open("wb") as file:
            file.truncate(2**31)
    else:
        path.write_bytes(make())
    before = bundles.everything(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            verify(path, by)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert re.search(hint, message), message
    assert message.isprintable()
    assert len(message) < 1100
    assert peak < LIMIT
    assert bundles.everything(tmp_path) == before
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize(
    "case", ["a bomb", "an unknown field with escape sequences", "another test set", "a pickled poison"]
)
def test_at_the_command_line_too(case: str, command: Run, tmp_path: Path) -> None:
    make, hint = CASES[case]
    (tmp_path / "theirs.zip").write_bytes(make())
    before = bundles.everything(tmp_path)
    message = refused(command, "verify", "theirs.zip")
    assert re.search(hint, message), message
    assert message.isprintable()
    assert bundles.everything(tmp_path) == before


def test_the_good_one_passes(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*arguments: Any, **_: Any) -> harness.Evaluation:
        _, _, recipes, seeds, _ = arguments
        drops = [3.0, 4.0] * (len(seeds) // 2)
        return harness.Evaluation([bundles.scores(n, list(seeds), drops) for n in recipes], 1.0)

    monkeypatch.setattr(harness, "evaluate", measured)
    path = tmp_path / "theirs.zip"
    path.write_bytes(bundles.bundle())
    read = bundle.read(path)
    assert (read.manifest.name, read.poison.hash) == ("theirs", bundles.poison().hash)
    code, _, err = command("verify", str(path))
    assert code == 0, err
    assert not list((tmp_path / "temporary").iterdir())


def test_what_is_no_file_is_refused(command: Run, tmp_path: Path) -> None:
    assert "cannot read nowhere.zip" in refused(command, "verify", "nowhere.zip")
    (tmp_path / "empty").mkdir()
    assert "cannot read empty/record.json" in refused(command, "verify", "empty")


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes in the file system")
def test_a_pipe_is_not_waited_for(command: Run, tmp_path: Path) -> None:
    subprocess.run(["mkfifo", str(tmp_path / "theirs.zip")], check=True)
    assert "is no file" in refused(command, "verify", "theirs.zip")
    assert "is no file" in refused(command, "evaluate", "theirs.zip")


def test_nothing_of_a_stranger_s_bytes_is_kept(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are written anew: what a stranger hid beside what is read does not reach the results."""

    def measured(*arguments: Any, **_: Any) -> harness.Evaluation:
        _, _, recipes, seeds, _ = arguments
        return harness.Evaluation(
            [bundles.scores(n, list(seeds), [3.0] * len(seeds)) for n in recipes], 1.0
        )

    monkeypatch.setattr(harness, "evaluate", measured)
    made, hidden = bundles.poison(), base64.b64encode(b"hidden here by a stranger")
    claim = bundles.record(made).model_dump_json().encode()
    twice = b'{"remark": "' + hidden + b'", ' + claim[1:]  # the same field comes again
    arrays = {"images": made.images, "indices": made.indices, "labels": made.labels}
    header = {
        "format": "poisonbench-poison-1", "budget": made.budget.model_dump_json(),
        "train_hash": made.train_hash, "hash": made.hash, "more": hidden.decode(),
    }  # fmt: skip
    data = save(arrays, {"poisonbench": json.dumps(header), "more": hidden.decode()})
    path = tmp_path / "theirs.zip"
    path.write_bytes(bundles.bundle(data, twice))
    assert hidden in path.read_bytes()
    assert command("verify", str(path))[0] == 0
    written = [p.read_bytes() for p in (tmp_path / "results").rglob("*") if p.is_file()]
    assert len(written) == 4
    assert not any(hidden in each for each in written)
    (kept,) = (tmp_path / "results").rglob("poison.safetensors")
    assert PoisonSet.load(kept).hash == made.hash


def test_a_plugin_may_not_take_an_attack_s_name(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_plugin.py").write_text("from pathlib import Path\nPath('executed').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint("mgd", "their_plugin:Attack", "poisonbench.attacks")]
    monkeypatch.setattr(_plugins, "entry_points", lambda group: [p for p in points if p.group == group])
    (tmp_path / "theirs.zip").write_bytes(bundles.bundle())
    before = bundles.everything(tmp_path)
    for words in (["verify", "theirs.zip"], ["list"], ["run", "--attack", "mgd"]):
        assert "takes the name 'mgd', which is in use" in refused(command, *words)
    assert bundles.everything(tmp_path) == before
    assert "their_plugin" not in sys.modules
