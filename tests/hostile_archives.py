"""Archives that are no bundles, and bundles whose archive plays tricks: see `test_hostile_bundles`."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bundles
import numpy as np

Change = Callable[[], bytes]
CENTRAL, LOCAL = b"PK\1\2", b"PK\3\4"


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


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
