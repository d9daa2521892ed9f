"""The tables: every committed record, game by game, as Markdown and as CSV.

Everything here is derived. `update` reads the records below a folder and writes `README.md`, one CSV
per table and the figures beside them, and the static site; the same records give the same texts on
every machine, byte for byte, and figures of the same numbers, so a test can compare what is committed
with what the records give.

A record may come from a stranger, so whatever it says is escaped before it stands on a page.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC
from itertools import chain
from pathlib import Path
from urllib.parse import quote

import jinja2
import pandas as pd

from poisonbench import records, tracks
from poisonbench._files import require_writable, write_text
from poisonbench.errors import UserError
from poisonbench.records import Record
from poisonbench.statistics import CONFIDENCE, CURRENT, RULES, Interval, as_columns, mean_interval
from poisonbench.threat import LInf

from .columns import marks
from .defended import defense_tables, left_out
from .figures import FOLDER, Picture, of_defenses, of_game, of_transfer, pictures
from .games import Game, Row, read
from .grids import CONTROLS, DefenseTable
from .names import canonical
from .site import left_over, require_ours
from .site import pages as build_site

BEGIN = "<!-- leaderboard: begin -->"
END = "<!-- leaderboard: end -->"
LONGEST = 300
"""Characters of a record's text that a page shows; the CSV has the rest."""


def build(results: Path, rules: int = CURRENT) -> dict[Path, str]:
    """All tables of the records below a folder.

    Args:
        results: the folder.
        rules: version of the rule that ranks attacks.

    Returns:
        The text of every file to write but figures, by its path relative to the folder.

    Raises:
        UserError: a record is not valid.
    """
    return _files(_Board.of(results, rules), rules)


def update(
    results: Path, readme: Path | None = None, check: bool = False, site: Path | None = None
) -> list[Path]:
    """Bring the files up to date with the records, or say which are not.

    Args:
        results: where the records are, and where the tables go.
        readme: a page whose part between the markers is replaced by the frozen tracks' tables, those of
            the tracks' own fractions.
        check: write nothing.
        site: where the static site goes, if it is wanted.

    Returns:
        The paths that were not what the records give, tables that belong to no record included.
        Without `check` they now are up to date, or gone.

    Raises:
        UserError: a record is not valid, the page lacks its markers, the folder of the site holds
            something else, or a file cannot be written.
    """
    board = _Board.of(results)
    wanted = {results / path: text for path, text in _files(board, CURRENT).items()}
    if readme is not None:
        wanted[readme] = _inserted(readme, results, board.games)
    drawn = {results / path: picture for path, picture in board.figures.items()}
    there = [*(results / "tables").glob("*.csv"), *(results / FOLDER).glob("*.png")]
    stale = sorted(path for path in there if path not in wanted and path not in drawn)
    pages: Iterator[tuple[Path, str]] = iter(())
    if site is not None:
        require_ours(site, results)
        made = build_site(
            results, site, board.games, board.defense_tables, board.figures, board.left_out
        )
        pages = ((site / path, text) for path, text in made)
    changed, known = [], set()
    for path, text in chain(pages, wanted.items()):
        known.add(path)
        if _bytes(path) != text.encode():
            changed.append(path)
            if not check:
                write_text(path, text)
    redrawn = [path for path, picture in drawn.items() if not picture.is_in(path)]
    stale += left_over(site, known) if site is not None else []
    if not check:
        for path in redrawn:
            drawn[path].save(path)
        for path in stale:
            path.unlink()
    return changed + redrawn + stale


def of_earlier_rules(results: Path, rules: int, to: Path) -> list[Path]:
    """Write the tables that the records give under another version of the rules to a folder.

    Links to records lead nowhere from there, and figures, which show no ranks, are not drawn again.

    Returns:
        The files written.

    Raises:
        UserError: there is no such version, a record is not valid, or the folder is not empty.
    """
    if rules not in RULES:
        raise UserError(f"--rules {rules}: the versions are {', '.join(map(str, RULES))}")
    if to.exists() and any(to.iterdir()):
        raise UserError(f"--to {to} is not empty: name a new folder")
    require_writable(to)
    files = {to / path: text for path, text in build(results, rules).items()}
    for path, text in files.items():
        write_text(path, text)
    return list(files)


def escape(text: object) -> str:
    """Text that Markdown and HTML show as it is, on one line and in a table cell too."""
    line = "".join(c for c in " ".join(str(text).split()) if c.isprintable())
    if len(line) > LONGEST:
        line = line[: LONGEST - 1] + "…"
    # A colon before more text, or a point after www, would make a link even without brackets.
    line = re.sub(r"([\\`*_\[\]|~$]|:(?=\S)|(?<=www)\.)", r"\\\1", line)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


@dataclass(frozen=True)
class _Board:
    """All that the pages show, of records that were read once."""

    games: list[Game]
    defense_tables: list[DefenseTable]
    figures: dict[Path, Picture]
    left_out: list[tuple[str, Record, str]]

    @staticmethod
    def of(results: Path, rules: int = CURRENT) -> _Board:
        found = records.find(results)
        games = read(results, rules, found)
        several = defense_tables(results, games, found)
        figures = pictures(games, results, several)
        return _Board(games, several, figures, left_out(results, games, found))


def _files(board: _Board, rules: int) -> dict[Path, str]:
    games, several, figures = board.games, board.defense_tables, board.figures
    frozen = [
        (track, [game for game in games if game.frozen and game.track == name])
        for name, track in tracks.TRACKS.items()
    ]
    page = _template("results.md.j2").render(
        tracks=frozen,
        custom=[game for game in games if not game.frozen],
        set_aside=[(game, row) for game in games for row in game.set_aside],
        figures=figures,
        rules=rules,
        rule=RULES[rules].statement,
        of_game=of_game,
        of_transfer=of_transfer,
        of_defenses=of_defenses,
        controls=CONTROLS,
        left_out=board.left_out,
        defended_of={table.game.slug: table for table in several},
        curves={
            name: [path for path, picture in figures.items() if picture.numbers.get("track") == name]
            for name in tracks.TRACKS
        },
        percent=f"{CONFIDENCE:.0%}".replace("%", " %"),
    )
    tables = {Path("tables", f"{game.slug}.csv"): _csv(game) for game in games}
    defended = {
        Path("tables", f"{table.game.slug}-defences.csv"): _defended_csv(table) for table in several
    }
    return {Path("README.md"): page} | tables | defended


def _inserted(readme: Path, results: Path, games: list[Game]) -> str:
    """The page with its marked part replaced; all else keeps its bytes."""
    try:
        text = readme.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {readme}: {error}") from None
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in after or END in before + after:
        raise UserError(f"{readme} must hold the lines {BEGIN} and {END} once each, in this order")
    tables = _template("readme.md.j2").render(
        games=[game for game in games if game.frozen and game.ranked and _of_its_track(game)],
        root=Path(os.path.relpath(results, readme.parent)).as_posix(),
    )
    return f"{before}{BEGIN}\n{tables}{END}{after}"


def _of_its_track(game: Game) -> bool:
    """Whether the fraction is the track's own; a first page has no room for every other."""
    return game.ranked[0].record.budget.fraction == tracks.TRACKS[game.track].budget.fraction


def _csv(game: Game) -> str:
    rows = [_flat(game, row) for row in game.ranked + game.set_aside]
    # As objects, so that a rank that one row lacks does not turn the others into floats.
    return pd.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n")


def _defended_csv(defended: DefenseTable) -> str:
    rows = []
    for table, defense in ((t, d) for t in defended.by_recipe for d in t.defenses):
        for cell in table.of(defense):
            certificate = cell.certificate
            row: dict[str, object] = {
                "victims": table.judge, "pairs": cell.price.n,
                "defense": cell.defense, "defense_config": canonical(cell.record.defense_config),
                "trusted_images": cell.trusted,
                "attack": cell.attack, "adaptive": cell.adaptive, "other_processor": cell.elsewhere,
                **_ends("undefended_poisoned", cell.bare), **_ends("lost", mean_interval(cell.lost)),
                **_ends("clean", cell.clean), **_ends("poisoned", cell.poisoned),
                **_ends("price", cell.price), **_ends("won", mean_interval(cell.won)),
                **_ends("won_back", cell.won_back),
                "precision": _six(cell.precision), "recall": _six(cell.recall),
                "clean_images_lost": _six(cell.clean_lost),
                **_cost(table, defense),
                "certified": None if certificate is None else certificate.promised,
                "certificate_changes": None if certificate is None else certificate.changes,
                "certificate_violations": None if certificate is None else certificate.violations,
                "evaluation_seconds": cell.record.evaluation_seconds,
                "record": f"{cell.folder}/record.json",
            }  # fmt: skip
            rows.append({name: _no_formula(value) for name, value in row.items()})
    return pd.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n")


def _cost(defended: DefenseTable, defense: str) -> dict[str, object]:
    """What a defence costs: median, least and most of its rounds, and by count."""
    found = defended.costs.get(defense)
    names = ("cost_trainings", "cost_least", "cost_most", "cost_by_count")
    if found is None:
        return dict.fromkeys(names)
    costs, cost = found
    numbers = (cost.trainings, min(cost.ratios), max(cost.ratios), costs.counted(cost))
    return {name: _six(value) for name, value in zip(names, numbers, strict=True)}


def _six(value: float | None) -> float | None:
    # Six digits, as in the records: the last bits differ between machines, and tables must not.
    return None if value is None else round(value, 6) + 0.0


def _flat(game: Game, row: Row) -> dict[str, object]:
    """A row of the CSV: everything that the page shows, in full, and what it leaves out."""
    record = row.record
    pixels = record.budget.pixels
    scores: dict[str, object] = {}
    for recipe in game.recipes:
        victim = row.scores(recipe)
        scores[f"{recipe}_seeds"] = len(victim.seeds)
        for name, interval in (
            ("drop", victim.drop), ("best_epoch_drop", victim.best_drop),
            ("clean", victim.clean_accuracy), ("poisoned", victim.poisoned_accuracy),
        ):  # fmt: skip
            scores |= _ends(f"{recipe}_{name}", interval)
        again = row.verification and row.verification.victim(recipe)
        scores |= _ends(f"{recipe}_remeasured_drop", again.drop if again else None)
    for recipe in game.transfer:
        carried = row.transfer.get(recipe)
        scores |= _ends(f"transfer_{recipe}_drop", carried.drop if carried else None)
    flat: dict[str, object] = {
        "rank": row.rank, "tied": row.tied, "above_controls": row.above_controls,
        "attack": record.attack, "control": row.control is not None,
        "attack_config": canonical(record.attack_config), "attack_seed": record.attack_seed,
        "status": record.status, "remark": record.remark,
        "flagged": bool(row.flagged), "disputed": bool(row.disputes),
        "track": record.track, "custom": " ".join(record.custom), "frozen": game.frozen,
        "fraction": record.budget.fraction, "mode": record.budget.mode,
        "labels": record.budget.labels, "pixels": pixels.kind,
        "radius": pixels.radius if isinstance(pixels, LInf) else None,
        "defense": record.defense, "dataset": record.dataset.name, "surrogate": record.surrogate,
        "num_train": record.num_train, "num_poison": record.num_poison, **scores,
        "crafting_seconds": record.crafting_seconds,
        "crafting_trainings": None if row.trainings is None else round(row.trainings, 1),
        "evaluation_seconds": record.evaluation_seconds,
        "processor": record.hardware.processor, "cores": record.hardware.cores,
        "device": record.hardware.device, "version": record.code.get("version"),
        "commit": record.code.get("commit"), "dirty": record.code.get("dirty"),
        "created": record.created.astimezone(UTC).isoformat(), "poison_hash": record.poison_hash,
        "record": f"{row.folder}/record.json",
    }  # fmt: skip
    return {name: _no_formula(value) for name, value in flat.items()}


def _ends(name: str, interval: Interval | None) -> dict[str, object]:
    return {column: _six(value) for column, value in as_columns(name, interval).items()}


def _no_formula(value: object) -> object:
    """Text that a spreadsheet would run as a formula, made plain text by an apostrophe."""
    danger = isinstance(value, str) and value.startswith(("=", "+", "-", "@"))
    return f"'{value}" if danger else value


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the pages are Markdown: the filter `text` escapes for both
    )
    environment.filters |= {"text": escape, "link": quote}
    environment.globals["marks"] = marks
    return environment.get_template(name)


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
