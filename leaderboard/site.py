"""The static site: a page for each track, one for each entry, and the rules.

It is made of files that refer to each other and to the results by relative paths, so it works from
`file://` as well as from a server, as long as both folders keep their places. Nothing is loaded from
elsewhere, and every page forbids it; what a record says is escaped by the templates' engine, and only
addresses of http and https are linked.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from poisonbench.errors import UserError
from poisonbench.records import Record, VictimScores
from poisonbench.statistics import CERTAIN, CONFIDENCE, CURRENT, RULES
from poisonbench.submission import manifest
from poisonbench.submission.manifest import Manifest
from poisonbench.tracks import TRACKS

from . import papers
from .columns import columns, marks, standing
from .figures import Picture, of_defenses, of_game, of_transfer
from .games import Game, Row
from .grids import CONTROLS, Cell, DefenseTable
from .names import canonical

ASSETS = ("board.css", "board.js", "icon.svg", "datatables.min.js", "datatables.LICENSE.txt")
GENERATOR = "poisonbench leaderboard"
"""Every page says that it is ours."""
LONGEST = 2000
"""Characters of a record's text that a page shows; the record has the rest."""
MOST = 100
"""Options of a record that a page shows."""
PICTURES = {
    "poisons.png": "The first poisoned training images, before and after, and the difference.",
    "accuracy.png": "Test accuracy of every pair of victims, clean and poisoned, joined by lines.",
    "crafting.png": "The loss that the attack climbed, over the course of crafting.",
}
"""What a run may leave beside its record, with what it shows to those who do not see it."""


@dataclass(frozen=True)
class Sheet:
    """All that the page of one entry shows.

    Attributes:
        row: in its table.
        game: the table.
        entry: what its author says of it, where it came by submission.
        cells: what defences made of it, with their tables' judges.
    """

    row: Row
    game: Game
    entry: Manifest | None
    cells: list[Cell]

    @property
    def settings(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """What was run: the attack's options, the budget and the data, under their headings."""
        record = self.row.record
        numbers = {"training images": record.num_train, "poisoned images": record.num_poison}
        return [
            (f"attack {record.attack}", _told({**record.attack_config, "seed": record.attack_seed})),
            ("budget", _told(record.budget.model_dump())),
            ("data", _told({**record.dataset.model_dump(), **numbers})),
        ]


def pages(
    results: Path,
    site: Path,
    games: Sequence[Game],
    several: Sequence[DefenseTable],
    figures: dict[Path, Picture],
    outside: Sequence[tuple[str, Record, str]],
) -> Iterator[tuple[Path, str]]:
    """Every file of the site, one after the other: together they would fill the memory.

    Args:
        results: where the records are.
        site: where the site goes; links to the results depend on it.
        games: tables of the records.
        several: their defences.
        figures: what is drawn, by path relative to the results.
        outside: defended records that stand in no table: folder, record and reason.

    Returns:
        Paths relative to the site, with their texts.

    Raises:
        UserError: what lies beside a record is not valid; before the first file.
    """
    entries = {
        row.folder: manifest.entry_of(results / row.folder) if manifest.FILE in row.beside else None
        for game in games
        for row in (*game.ranked, *game.set_aside)
    }
    slugs = _slugs([row.folder for game in games for row in (*game.ranked, *game.set_aside)])
    defended_of = {defended.game.slug: defended for defended in several}
    shared: dict[str, Any] = {
        "slugs": slugs, "figures": figures, "defended_of": defended_of,
        "custom": [game for game in games if not game.frozen],
        "frozen": {name: [g for g in games if g.frozen and g.track == name] for name in TRACKS},
    }  # fmt: skip
    top, below = _Writer(results, site, "", shared), _Writer(results, site, "../", shared)
    assets = Path(__file__).with_name("assets")
    yield (
        Path("index.html"),
        top.page("index.html.j2", here="index"),
    )  # first: a folder is known for ours by a page
    yield from ((Path("assets", name), (assets / name).read_text("utf-8")) for name in ASSETS)
    yield Path("about.html"), top.page("about.html.j2", here="about")
    yield Path("other.html"), top.page("other.html.j2", here="other", outside=outside)
    for name, track in TRACKS.items():
        yield Path(f"track-{name}.html"), top.page("track.html.j2", here=name, track=track)
    for game in games:
        cells_of = _cells(defended_of.get(game.slug))
        here = game.track if game.frozen else "other"
        for row in (*game.ranked, *game.set_aside):
            cells = cells_of.get(row.record.poison_hash, []) if row.rank else []
            sheet = Sheet(row, game, entries[row.folder], cells)
            text = below.page("entry.html.j2", here=here, sheet=sheet)
            yield Path("entries", f"{slugs[row.folder]}.html"), text


def require_ours(site: Path, results: Path) -> None:
    """Refuse a folder that holds something else, of which nothing may be overwritten or deleted.

    Raises:
        UserError: it does, the records for one.
    """
    if results.resolve().is_relative_to(site.resolve()):
        raise UserError(f"--site {site} holds the records of {results}: name a folder of its own")
    mark = f'name="generator" content="{GENERATOR}"'.encode()
    if _files(site) and not any(mark in path.read_bytes()[:2000] for path in site.glob("*.html")):
        raise UserError(f"{site} holds something else than a board: name an empty folder in --site")


def left_over(site: Path, known: Container[Path]) -> list[Path]:
    """Files in the site's folder that do not belong to it."""
    return [path for path in _files(site) if path not in known]


def _files(site: Path) -> list[Path]:
    """All that lies in a folder; what is hidden is nobody's business."""
    return sorted(
        path
        for path in site.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(site).parts)
    )


class _Writer:
    """Renders the pages of one folder of the site.

    Args:
        results: where the records are.
        site: where the site goes.
        root: from a page to the top of the site.
        shared: what every page may use.
    """

    def __init__(self, results: Path, site: Path, root: str, shared: dict[str, Any]) -> None:
        folder = site / "entries" if root else site
        self._up = quote(Path(os.path.relpath(results, folder)).as_posix())
        self._recipes: dict[str, Markup] = {}
        self._environment = _environment()
        self._environment.globals |= shared | {
            "root": root, "result": self._result, "columns": columns, "marks": marks,
            "standing": standing, "tracks": TRACKS,
            "of_game": of_game, "of_transfer": of_transfer, "of_defenses": of_defenses,
            "of_attack": papers.of_attack, "of_entry": papers.of_entry, "summary": papers.summary,
            "address": papers.address, "generator": GENERATOR, "controls": CONTROLS,
            "ranking": RULES[CURRENT].statement, "rules": CURRENT,
            "confidence": f"{CONFIDENCE:.0%}".replace("%", " %"),
            "certain": f"{CERTAIN:.0%}".replace("%", " %"),
            "command": _command, "pictures": PICTURES, "told": _told,
            "describe": _describe, "recipe": self._recipe, "seeds": _seeds,
        }  # fmt: skip

    def page(self, template: str, **values: Any) -> str:
        """The text of a page."""
        return self._environment.get_template(template).render(values)

    def _recipe(self, victim: VictimScores) -> Markup:
        """The numbers of a recipe, which is mostly that of its track, and rendered once."""
        key = canonical([victim.recipe_name, victim.recipe])
        if key not in self._recipes:
            self._recipes[key] = Markup(self.page("recipe.html.j2", victim=victim))
        return self._recipes[key]

    def _result(self, *parts: str) -> str:
        """The address of a file among the results."""
        return "/".join([self._up, *map(quote, parts)])


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates") / "site"),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        finalize=_plain,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["short"] = _short
    return environment


def _plain(value: Any) -> Any:
    """Text without control characters, such as those that turn the direction of what follows."""
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return "".join(c if c.isprintable() or c == "\n" else " " for c in value)


def _short(text: object, longest: int = LONGEST) -> str:
    """Text up to a length that a page can show."""
    whole = str(text)
    return whole if len(whole) <= longest else whole[: longest - 1] + "…"


def _told(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values, as far as a page can show them."""
    told = list(values.items())[:MOST]
    return [(name, v if isinstance(v, str) else canonical(v)) for name, v in told]


def _seeds(victim: VictimScores) -> list[tuple[int, Markup]]:
    """Cells of a table: for each seed clean, poisoned, what was lost, and the best epochs."""
    several = zip(
        victim.clean, victim.poisoned, victim.drops, victim.clean_best, victim.poisoned_best, strict=True
    )
    cell = '<td class="num">{:.2f}</td>'  # of numbers, which need no escaping
    return [
        (seed, Markup("".join(cell.format(round(x, 9) + 0.0) for x in numbers)))
        for seed, numbers in zip(victim.seeds, several, strict=True)
    ]


def _command(record: Record) -> str | None:
    """The record's command, where it runs this program and a shell would read nothing else into it."""
    try:
        words = shlex.split(record.command)
    except ValueError:
        return None
    safe = words[:1] == ["poisonbench"] and shlex.join(words) == record.command
    return record.command if safe and record.command.isprintable() else None


def _cells(defended: DefenseTable | None) -> dict[str, list[Cell]]:
    """What defences made of each poison, by its hash."""
    found: dict[str, list[Cell]] = {}
    if defended is not None:
        for cell in (cell for defense in defended.defenses for cell in defended.of(defense)):
            found.setdefault(cell.record.poison_hash, []).append(cell)
    return found


def _describe(picture: Picture) -> str:
    """What a figure shows, for those who do not see it."""
    numbers = picture.numbers
    if "points" in numbers:
        shown = numbers["points"]
        best = max(shown, key=lambda point: point["drop"])
        return (
            f"Points lost by {numbers['victims']} victims against the cost of crafting, {len(shown)}"
            f" poisons. The most is {best['drop']:.2f} points, by {best['name']}, for"
            f" {best['trainings']:,.0f} trainings of a victim."
        )
    if "defenses" in numbers:
        return (
            f"Heat map of the points of accuracy that each of {len(numbers['defenses'])} defences wins"
            f" back from each of {len(numbers['attacks'])} attacks, and the share of all that was lost"
            f" against the price of the defence. On the Pareto front: {', '.join(numbers['front'])}."
            " The numbers are in the table of defences."
        )
    if "kinds" in numbers:
        carried = "; ".join(
            f"{attack['name']}: "
            + ", ".join(
                f"{kind} {drop['drop']:.2f}"
                for kind, drop in zip(numbers["kinds"], attack["drops"], strict=True)
            )
            for attack in numbers["attacks"]
        )
        return f"Points lost by victims of every kind, by the first row of each attack. {carried}."
    lines = "; ".join(
        f"{line['name']}: "
        + ", ".join(f"{p['drop']:.2f} at {100 * p['fraction']:.4g} %" for p in line["points"])
        for line in numbers["lines"]
    )
    return f"Points lost by {numbers['victims']} victims against the share poisoned. {lines}."


def _slugs(folders: Sequence[str]) -> dict[str, str]:
    """A file name for each folder: letters, digits and `-`, `_`, unique however a system compares."""
    plain = {folder: _slug(folder) for folder in folders}
    uses = Counter(plain.values())
    return {
        folder: slug
        if uses[slug] == 1 and slug == folder.replace("/", "-")
        else f"{slug}-{hashlib.sha256(folder.encode()).hexdigest()[:8]}"
        for folder, slug in plain.items()
    }


@cache
def _slug(folder: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", folder.lower())[-100:].strip("-_")
