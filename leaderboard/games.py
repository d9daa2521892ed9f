"""Which records stand in one table, and in what order.

Records are compared only where they were measured alike: a table is the set of records without a
defence that share data, victims, evaluation seeds and budget. Whether it belongs to a frozen track is
decided by what its records say was run, not by what they call themselves.
"""

from __future__ import annotations

import hashlib
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from poisonbench import records, transfer, verification
from poisonbench.records import Record, VictimScores
from poisonbench.statistics import CURRENT, RULES, Interval
from poisonbench.stored import Hardware
from poisonbench.submission import manifest
from poisonbench.tracks import TRACKS, departures
from poisonbench.verification import Dispute, Verification

from .names import attack_name, canonical, crafted, telling_options

Found = Sequence[tuple[Path, Record]]
"""Records with their paths, as `poisonbench.records.find` gives them."""
FLIPS = ("label_flip (spread=random)", "label_flip (spread=concentrated)")


@dataclass(frozen=True)
class Row:
    """One record in its table.

    Attributes:
        record: what was measured.
        folder: where it lies, relative to the results, with `/` between parts.
        pictures: names of the pictures beside it.
        name: the attack, with the options that tell it from its neighbours.
        control: which of the controls that every table should have it is, if any. A poison that
            was handed in is none, whatever it is called; nor is a submitted entry.
        transfer: scores on the track's transfer victims, by name, as far as they were measured.
        verification: what a maintainer measured of its poison, if anything.
        disputes: results that break it, in the order in which they were raised.
        beside: names of the files in its folder.
        trainings: crafting time in trainings of one victim on the same hardware; None where it was not
            measured.
        rank: its place, from 1; None where the record is set aside.
        tied: another row has the same rank.
        above_controls: it costs more than every control of its table; None for a control, or where there
            is none.
    """

    record: Record
    folder: str
    pictures: tuple[str, ...]
    name: str
    control: str | None
    transfer: Mapping[str, VictimScores]
    verification: Verification | None = None
    disputes: tuple[Dispute, ...] = ()
    beside: frozenset[str] = frozenset()
    trainings: float | None = None
    rank: int | None = None
    tied: bool = False
    above_controls: bool | None = None

    @cached_property
    def excess(self) -> dict[str, Interval]:
        """By how much it claims more than a maintainer measured, in points, recipe by recipe."""
        return self.verification.excess(self.record) if self.verification else {}

    @property
    def flagged(self) -> list[str]:
        """The recipes on which it claims more than the measurement allows."""
        return self.verification.flagged(self.record) if self.verification else []

    def scores(self, recipe: str) -> VictimScores:
        """What victims of that recipe scored; the rows of a table share their recipes."""
        scores = self.record.victim(recipe)
        assert scores is not None
        return scores

    def accuracy(self, recipe: str) -> str:
        """Mean accuracy of clean and of poisoned victims, in percent."""
        scores = self.scores(recipe)
        return f"{scores.clean_accuracy.mean:.2f} → {scores.poisoned_accuracy.mean:.2f}"

    @property
    def place(self) -> str:
        """The rank, and whether it is shared."""
        return f"{self.rank}{'=' if self.tied else ''}"

    @property
    def remark(self) -> str:
        """What a maintainer added to a record of ours that is valid; a stranger's is not passed on."""
        ours = manifest.FILE not in self.beside and self.record.status == "valid"
        return self.record.remark if ours else ""

    @property
    def works(self) -> str:
        """Whether it costs more than every control, in a word."""
        return "–" if self.above_controls is None else "yes" if self.above_controls else "no"

    @property
    def cost(self) -> str:
        """Crafting time."""
        seconds = self.record.crafting_seconds
        return "–" if seconds is None else f"{seconds:,.0f} s"

    @property
    def date(self) -> str:
        """When it was measured, in UTC."""
        return self.record.created.astimezone(UTC).date().isoformat()


@dataclass(frozen=True)
class Game:
    """One table: records that were measured alike.

    Attributes:
        track: what they ran under.
        frozen: they ran the track as it is, so this is a table of the benchmark.
        title: heading, unique on its page.
        slug: name of the CSV file, unique among them.
        recipes: the victims, the one that decides the ranks first.
        seeds: how many pairs of victims there are of each.
        transfer: transfer victims that some row has scores on.
        ranked: valid rows, best first.
        set_aside: rows marked invalid or superseded.
        missing: controls that no valid row is.
    """

    track: str
    frozen: bool
    title: str
    slug: str
    recipes: list[str]
    seeds: dict[str, int]
    transfer: list[str]
    ranked: list[Row]
    set_aside: list[Row]
    missing: list[str]

    @property
    def elsewhere(self) -> list[Row]:
        """Rows whose clean victims are not those of most: of another kind of processor, as a rule."""
        clean = {
            row.folder: tuple(tuple(row.scores(name).clean) for name in self.recipes)
            for row in self.ranked
        }
        usual = Counter(clean.values()).most_common(1)
        return [row for row in self.ranked if clean[row.folder] != usual[0][0]]


def read(results: Path, rules: int = CURRENT, found: Found | None = None) -> list[Game]:
    """Every table of the records below a folder: the frozen tracks' in their order, then the others.

    Args:
        results: the folder.
        rules: version of the rule that ranks attacks.
        found: its records, where they have been read already.

    Raises:
        UserError: a record is not valid.
    """
    groups: dict[str, list[tuple[Path, Record]]] = {}
    for path, record in records.find(results) if found is None else found:
        if record.defense != "none":
            continue  # see `defended`
        groups.setdefault(_key(record), []).append((path.parent, record))
    named = {key: _title(group[0][1]) for key, group in groups.items()}
    slugs = {key: _slug(title) for key, title in named.items()}
    uses = Counter(slugs.values())
    tables: list[Game] = []
    for key, group in groups.items():
        title, slug = named[key], slugs[key]
        if uses[slug] > 1:  # two headings that a reader or a file system could not tell apart
            mark = hashlib.sha256(key.encode()).hexdigest()[:8]
            title, slug = f"{title} ({mark})", f"{slug}-{mark}"
        tables.append(_game(title, slug, group, results, rules))
    order = list(TRACKS)
    return sorted(
        tables,
        key=lambda game: (order.index(game.track) if game.frozen else len(order), game.title),
    )


def _key(record: Record, *, any_fraction: bool = False) -> str:
    """All that two records must share to be compared, as canonical text; or all but the fraction."""
    budget = record.budget.model_dump(exclude={"fraction"} if any_fraction else None)
    victims = sorted(canonical([v.recipe_name, v.whole_recipe, v.seeds]) for v in record.victims)
    return canonical(
        [
            record.track, sorted(record.custom), record.dataset.model_dump(), record.hashes,
            record.num_train, budget, record.surrogate, victims,
        ]
    )  # fmt: skip


def _title(record: Record) -> str:
    changes = departures(record)
    custom = f", custom ({', '.join(changes)})" if changes else ""
    return f"{record.track}{custom}: {record.budget.game()}"


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", title.lower())[:100].strip("-.")


def _game(title: str, slug: str, group: list[tuple[Path, Record]], results: Path, rules: int) -> Game:
    first = group[0][1]
    seeds = {victim.recipe_name: len(victim.seeds) for victim in first.victims}
    recipes = sorted(seeds, key=lambda name: (name != first.surrogate, name))
    controls = ("none", "noise", *(FLIPS if first.budget.can_flip else ()))
    telling = telling_options([record for _, record in group if record.status == "valid"])
    ranked: list[Row] = []
    set_aside: list[Row] = []
    for folder, record in group:
        kind = attack_name(record, {"spread"})
        beside = frozenset(path.name for path in folder.iterdir() if path.is_file())
        submitted = manifest.FILE in beside
        verified = verification.FILE in beside
        disputed = any(fnmatchcase(name, verification.DISPUTES) for name in beside)
        name = attack_name(record, telling.get(record.attack, ()))
        row = Row(
            record=record,
            folder=folder.relative_to(results).as_posix(),
            pictures=tuple(p for p in ("summary.png",) if p in beside),
            name=f"{name} (submitted)" if submitted else name,
            control=kind if kind in controls and not submitted else None,
            transfer=_transfer(folder, record) if transfer.FILE in beside else {},
            verification=verification.verification_of(folder, record) if verified else None,
            disputes=tuple(verification.disputes_of(folder, record)) if disputed else (),
            beside=beside,
        )
        (ranked if record.status == "valid" else set_aside).append(row)
    ranked = _with_ranks(_with_costs(ranked), recipes[0], rules)
    there = {row.control for row in ranked}
    track = TRACKS.get(first.track)
    others = track.transfer if track else ()
    carried = [name for name in others if any(name in row.transfer for row in ranked)]
    return Game(
        track=first.track, frozen=not departures(first), title=title, slug=slug,
        recipes=recipes, seeds=seeds, transfer=carried, ranked=ranked,
        set_aside=sorted(set_aside, key=lambda row: row.folder),
        missing=[control for control in controls if ranked and control not in there],
    )  # fmt: skip


def _transfer(folder: Path, record: Record) -> dict[str, VictimScores]:
    """Scores on transfer victims, where they are of this poison and of the track as it is now.

    Raises:
        UserError: the file is not valid.
    """
    measured = transfer.Transfer.load(folder / transfer.FILE)
    return {v.recipe_name: v for v in measured.victims} if measured.is_of(record) else {}


def _with_costs(rows: list[Row]) -> list[Row]:
    """Crafting times in trainings.

    A busy machine lengthens these too, in one record or in most of a table's: of a record's own and the
    median over those of the same hardware, the shorter counts.
    """
    each = [
        row.record.evaluation_seconds / (2 * sum(len(victim.seeds) for victim in row.record.victims))
        for row in rows
    ]
    alike: dict[Hardware, list[float]] = {}
    for row, own in zip(rows, each, strict=True):
        alike.setdefault(row.record.hardware, []).append(own)
    medians = {hardware: statistics.median(several) for hardware, several in alike.items()}
    units = [min(own, medians[row.record.hardware]) for row, own in zip(rows, each, strict=True)]
    return [
        replace(row, trainings=row.record.crafting_seconds / unit)
        if unit and row.record.crafting_seconds is not None
        else row
        for row, unit in zip(rows, units, strict=True)
    ]


def _with_ranks(rows: list[Row], recipe: str, rules: int) -> list[Row]:
    """Valid rows in order of rank, then of drop, name and folder."""
    drops = [_judged(row, recipe) for row in rows]
    controls = [i for i, row in enumerate(rows) if row.control]
    places, above = RULES[rules].ranks_and_above(drops, controls)
    means = [statistics.fmean(each) for each in drops]
    shared = Counter(places)
    # Rounded, so that the last bit of a machine's floating point does not order two equal drops.
    order = sorted(
        range(len(rows)),
        key=lambda i: (places[i], -round(means[i], 6), rows[i].name, rows[i].folder),
    )
    return [
        replace(
            rows[i], rank=places[i], tied=shared[places[i]] > 1,
            above_controls=above[i] if controls and not rows[i].control else None,
        )
        for i in order
    ]  # fmt: skip


def _judged(row: Row, recipe: str) -> list[float]:
    """The drops that decide a row's rank: a maintainer's, if on as many seeds, before its author's.

    Of more seeds the first count, since all rows of a table are compared by equally many.
    """
    claimed = row.scores(recipe).drops
    measured = row.verification.victim(recipe) if row.verification else None
    enough = measured is not None and len(measured.drops) >= len(claimed)
    return measured.drops[: len(claimed)] if measured and enough else claimed


def by_fraction(games: Iterable[Game]) -> list[list[Game]]:
    """Tables that differ in nothing but the fraction, together; those that stand alone are left out."""
    alike: dict[str, list[Game]] = {}
    for game in games:
        if game.ranked:
            alike.setdefault(_key(game.ranked[0].record, any_fraction=True), []).append(game)
    return [group for group in alike.values() if len(group) > 1]


def lines(group: Iterable[Game]) -> list[tuple[str, list[tuple[float, Row]]]]:
    """Attacks that were crafted at two fractions or more: a name, and rows by fraction.

    What was handed in is left out: nobody can say that two such poisons are of one attack.
    """
    rows = [
        row
        for game in group
        for row in game.ranked
        if crafted(row.record) and manifest.FILE not in row.beside
    ]
    telling = telling_options([row.record for row in rows])
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(attack_name(row.record, telling[row.record.attack]), []).append(row)
    by_name = {
        name: sorted(((row.record.budget.fraction, row) for row in line), key=lambda point: point[0])
        for name, line in found.items()
    }
    return [(n, line) for n, line in sorted(by_name.items()) if len({f for f, _ in line}) > 1]
