"""Whatever bytes there are, a loader gives what they say or a `UserError` of one line, and nothing else.

By hypothesis, over the loaders of everything that may come from a stranger: arbitrary bytes, good bytes
with some of them changed, left out or doubled, and good JSON with arbitrary values in its places.

- `bundle.read`: also where the members are spoilt and the archive around them is right, hashes and all;
- `PoisonSet.load` and `PoisonSet.check`;
- `Record.parse`, `Manifest.parse`, `Verification.parse` and `Dispute.parse`: what they let through can
  be written, read back the same, and shown: intervals, dates and games can be made of it.

The same examples every time: a failure here is a defect, not a chance.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC
from pathlib import Path
from typing import Any

import bundles
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poisonbench import tracks
from poisonbench.errors import UserError
from poisonbench.records import Record
from poisonbench.stored import Stored
from poisonbench.submission import bundle
from poisonbench.submission.claims import require_claim
from poisonbench.submission.manifest import Manifest
from poisonbench.threat import PoisonSet
from poisonbench.verification import Dispute, Verification

always = settings(
    max_examples=100,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.just(10**4000)
    | st.floats()
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(autouse=True, scope="module")
def folder() -> Iterator[Path]:
    """One for all examples, on the small track."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as name:
        bundles.shrink(patch)
        yield Path(name)


def spoilt(good: bytes) -> st.SearchStrategy[bytes]:
    """Good bytes with a few changed, a part left out, or a part doubled."""
    place = st.integers(0, len(good) - 1)

    def changed(edits: list[tuple[int, int]]) -> bytes:
        data = bytearray(good)
        for at, value in edits:
            data[at] = value
        return bytes(data)

    return st.one_of(
        st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=5).map(changed),
        st.tuples(place, place).map(lambda ends: good[: min(ends)] + good[max(ends) :]),
        st.tuples(place, place).map(lambda ends: good[: max(ends)] + good[min(ends) :]),
        st.tuples(place, st.binary(max_size=20)).map(lambda p: good[: p[0]] + p[1] + good[p[0] :]),
    )


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in inner:
            yield from places(each, (*path, key))


def replaced(good: bytes) -> st.SearchStrategy[bytes]:
    """A good JSON text with an arbitrary value in one of its places, or with a field too many."""
    whole = json.loads(good)

    def put(path: tuple[str | int, ...], value: Any) -> bytes:
        copy = json.loads(good)
        if not path:
            return json.dumps(value).encode()
        where = copy
        for step in path[:-1]:
            where = where[step]
        where[path[-1]] = value
        return json.dumps(copy).encode()

    return st.builds(put, st.sampled_from(list(places(whole))), JSON)


def attempt(load: Callable[[], Any]) -> Any:
    """What a loader gives; None where it refuses, as it should."""
    try:
        return load()
    except UserError as error:
        said = str(error)
    assert said.isprintable()
    assert len(said) < 1500
    return None


def good_verification() -> Verification:
    now = bundles.record(bundles.poison())
    return Verification(
        poison_hash=now.poison_hash, victims=now.victims, secret_hash="0" * 64, evaluation_seconds=1.0,
        created=now.created, command="", code=now.code, libraries={}, hardware=now.hardware,
    )  # fmt: skip


def good_dispute() -> Dispute:
    now = bundles.record(bundles.poison())
    return Dispute(poison_hash=now.poison_hash, reason="Why.", author="Ada", created=now.created)


GOOD: dict[type[Stored], bytes] = {
    Record: bundles.record(bundles.poison()).model_dump_json().encode(),
    Manifest: bundles.members()["manifest.json"],
    Verification: good_verification().model_dump_json().encode(),
    Dispute: good_dispute().model_dump_json().encode(),
}
TEXTS = st.sampled_from(list(GOOD)).flatmap(
    lambda kind: st.tuples(
        st.just(kind), st.one_of(st.binary(max_size=200), spoilt(GOOD[kind]), replaced(GOOD[kind]))
    )
)


@given(TEXTS)
@settings(always, max_examples=400)
def test_stored_texts(case: tuple[type[Stored], bytes]) -> None:
    kind, data = case
    found = attempt(lambda: kind.parse(data, "theirs"))
    if found is None:
        return
    assert kind.parse(found.model_dump_json().encode(), "ours") == found
    if isinstance(found, Record):
        attempt(lambda: require_claim(found, bundles.poison(), "theirs"))
        tracks.departures(found)
        assert found.budget.game()
    if isinstance(found, Record | Verification):
        for victim in found.victims:
            assert str(victim.drop) + str(victim.best_drop) + str(victim.clean_accuracy)
    if isinstance(found, Verification):
        found.flagged(bundles.record(bundles.poison()))
    if not isinstance(found, Manifest):
        assert found.created.astimezone(UTC)  # type: ignore[attr-defined]


@given(st.one_of(st.binary(max_size=500), spoilt(bundles.stored(bundles.poison()))))
@always
def test_poison_files(folder: Path, data: bytes) -> None:
    path = folder / "poison.safetensors"
    path.write_bytes(data)
    found = attempt(lambda: PoisonSet.load(path))
    if found is not None:
        clean = bundles.dataset()
        attempt(lambda: found.check(clean.train_images, clean.train_labels, clean.num_classes))


@given(st.one_of(st.binary(max_size=500), spoilt(bundles.bundle())))
@always
def test_bundles(folder: Path, data: bytes) -> None:
    path = folder / "theirs.zip"
    path.write_bytes(data)
    found = attempt(lambda: bundle.read(path))
    # Every byte has its place: what is read at all is the good one. Versions, times and rights in zip's
    # headers are all that may differ.
    assert found is None or found.manifest == bundle_of(bundles.bundle(), folder).manifest


@given(spoilt(GOOD[Record]), spoilt(bundles.stored(bundles.poison())), st.sampled_from("rpb"))
@always
def test_right_archives_of_spoilt_members(folder: Path, text: bytes, data: bytes, which: str) -> None:
    path = folder / "theirs.zip"
    good = bundles.stored(bundles.poison())
    path.write_bytes(
        bundles.bundle(good if which == "r" else data, GOOD[Record] if which == "p" else text)
    )
    found = attempt(lambda: bundle.read(path))
    if found is not None:
        assert found.poison.hash == found.record.poison_hash


def bundle_of(data: bytes, folder: Path) -> bundle.Bundle:
    path = folder / "good.zip"
    path.write_bytes(data)
    return bundle.read(path)


def test_the_good_ones_are_good(folder: Path) -> None:
    assert bundle_of(bundles.bundle(), folder).record == Record.parse(GOOD[Record], "")
    for kind, data in GOOD.items():
        assert kind.parse(data, "")
