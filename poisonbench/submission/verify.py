"""The maintainer's side: a claim held against victims of hidden seeds.

Nothing in a bundle is believed. Its poison is checked against its budget and the clean data, victims are
trained on seeds that its author could not know, and claimed and measured drops are written side by side.
A claim that exceeds the measurement is flagged and kept, for all to see.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from poisonbench import compute, data, harness, tracks, verification
from poisonbench._files import require_writable
from poisonbench.errors import UserError
from poisonbench.records import Record
from poisonbench.stored import code_version, provenance
from poisonbench.submission import bundle, claims, manifest, secret
from poisonbench.submission.bundle import Bundle
from poisonbench.submission.manifest import Manifest
from poisonbench.threat import PoisonSet
from poisonbench.verification import Verification


@dataclass(frozen=True)
class Verified:
    """An entry, what it claims and what was measured.

    Attributes:
        folder: where the entry lies.
        record: the claim.
        verification: the measurement.
        manifest: its author's words; None for a record that was not submitted.
    """

    folder: Path
    record: Record
    verification: Verification
    manifest: Manifest | None


@dataclass(frozen=True)
class Maintainer:
    """Who verifies, and where.

    Attributes:
        secret: what hidden seeds are derived from.
        results: where committed records live.
        out: folder for runs, where finished groups of victims are kept.
        data_dir: where TFDS sets lie on this machine.
        command: what was typed.
        seeds: hidden seeds; None for as many as the track has.
        trust_name: an entry may be called like an attack here, or like other authors' entries.
        fresh: measure anew what was measured before.
    """

    secret: bytes
    results: Path
    out: Path
    data_dir: str | None
    command: str
    seeds: int | None = None
    trust_name: bool = False
    fresh: bool = False


def verify(source: Path, by: Maintainer) -> Verified:
    """Measure a bundle's claim on hidden seeds, and write the entry to the results.

    The entry lies in `<track>/<name>/none/<name>-<poison hash>`: the claimed record, the poison, the
    manifest as `entry.json` and the measurement as `verification.json`. The folder of a record in the
    results may be given instead of a bundle; then the measurement is written beside that record. What
    was measured before, on as many seeds, is not measured again.

    Raises:
        UserError: the bundle is not valid, its claim cannot be measured, its poison breaks its budget or
            is for other data, its name is taken, or nothing can be written.
    """
    if source.is_dir():
        record, poison = Record.load(source / bundle.RECORD), PoisonSet.load(source / bundle.POISON)
        claims.require_claim(record, poison, str(source))
        folder, submitted = source, manifest.entry_of(source)
    else:
        read = bundle.read(source)
        record, poison, submitted = read.record, read.poison, read.manifest
        name = f"{record.attack}-{poison.hash[:8]}"
        folder = by.results / record.track / record.attack / record.defense / name
        there = folder.exists() and _is_of(folder, read)
        if not there and not by.trust_name:
            claims.require_own_name(record.attack, read.manifest.authors, by.results)
    count = tracks.load(record.track).seeds if by.seeds is None else by.seeds
    if count < 2:
        raise UserError("--seeds must be at least 2: one lone accuracy is never a result")
    done = verification.verification_of(folder, record)
    if done is not None and not by.fresh and len(done.victims[0].seeds) >= count:  # else, a trial
        return Verified(folder, record, done, submitted)
    measured = _measure(record, poison, folder, count, by)
    if folder.exists():
        measured.save(folder / verification.FILE)
    else:
        _write(folder, read, measured)
    return Verified(folder, record, measured, submitted)


def _is_of(folder: Path, read: Bundle) -> bool:
    """Whether the entry there is this one, word for word; others are not overwritten."""
    if Record.load(folder / bundle.RECORD) == read.record and manifest.entry_of(folder) == read.manifest:
        return True
    raise UserError(
        f"{folder} is there already, with another record or other words of its author; entries are never"
        " overwritten"
    )


def _measure(
    record: Record, poison: PoisonSet, folder: Path, count: int, by: Maintainer
) -> Verification:
    track = tracks.load(record.track)
    require_writable(folder)
    code_version()  # as in a run: what is committed meanwhile is not what runs
    compute.setup()
    dataset = data.load(track.dataset, by.data_dir)
    if (dataset.hashes(), len(dataset.train_labels)) != (record.hashes, record.num_train):
        raise UserError(
            f"the claim is about other data than {track.name} has here: fix --data-dir, or refuse it"
        )
    poison.check(dataset.train_images, dataset.train_labels, dataset.num_classes)
    public = record.victims[0].seeds
    seeds = secret.hidden_seeds(by.secret, poison.hash, count, public)
    kept = by.out / track.name / "victims"
    done = harness.evaluate(dataset, poison, dict(track.recipes), seeds, kept, reuse=not by.fresh)
    return Verification(
        poison_hash=poison.hash, victims=done.victims, secret_hash=secret.digest(by.secret),
        evaluation_seconds=round(done.seconds, 1), **provenance(by.command),
    )  # fmt: skip


def _write(folder: Path, read: Bundle, measured: Verification) -> None:
    """The entry, whole or not at all; every file is written anew, none is a stranger's bytes."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    read.record.save(partial / bundle.RECORD)
    read.poison.save(partial / bundle.POISON)
    read.manifest.save(partial / manifest.FILE)
    measured.save(partial / verification.FILE)
    partial.rename(folder)
