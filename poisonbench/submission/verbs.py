"""The verbs `submit`, `verify` and `dispute`, which `poisonbench.cli` takes in."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from poisonbench._options import DataDirOption, FreshOption, JsonOption, OutOption, command
from poisonbench.errors import UserError

if TYPE_CHECKING:
    from poisonbench.submission.verify import Verified

FLAGGED = 3
"""Exit code of a verification that does not bear out the claim."""

ResultsOption = Annotated[Path, typer.Option(help="Where committed records live.")]


def submit(
    folder: Annotated[Path, typer.Argument(help="A finished run, e.g. runs/digits/my_attack-….")],
    author: Annotated[list[str], typer.Option(help="Who made it. Repeatable, once for each.")],
    title: Annotated[
        str | None, typer.Option(help="The entry's name for people. [default: the attack's name]")
    ] = None,
    description: Annotated[
        str | None, typer.Option(help="What it does. [default: the attack's own first line]")
    ] = None,
    paper: Annotated[str | None, typer.Option(help="Address of the paper.")] = None,
    bibtex: Annotated[Path | None, typer.Option(help="File with the BibTeX entry to cite.")] = None,
    code: Annotated[
        str | None, typer.Option(help="Address of the code. [default: it is not public]")
    ] = None,
    licence: Annotated[
        str, typer.Option(help="Licence that the poison may be published under, as an SPDX identifier.")
    ] = "MIT",
    out: Annotated[
        Path | None, typer.Option(help="The bundle. [default: NAME-HASH.zip in this folder]")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Pack a finished run for the leaderboard's maintainers: manifest, record, poison, hashes.

    An attack whose code stays private enters by its poison alone: `poisonbench evaluate FILE --name
    NAME` makes the run. Pictures and tables are not packed: they follow from poison and record.
    """
    from poisonbench import attacks
    from poisonbench.records import Record
    from poisonbench.submission import bundle

    record = Record.load(folder / bundle.RECORD)
    known = record.attack in attacks.names()
    about = bundle.About(
        title=title or record.attack,
        authors=author,
        description=description or (attacks.summary(record.attack) if known else ""),
        paper=paper,
        bibtex="" if bibtex is None else _text(bibtex),
        code=code,
        licence=licence,
    )
    target, manifest = bundle.pack(folder, about, out)
    if record.code.get("dirty"):
        print("note: the run's code was not committed, which its record says", file=sys.stderr)
    if known and record.crafting_seconds is not None:
        print(
            f"note: if the attack {record.attack} is not yours, enter under a name of your own:"
            f" `poisonbench evaluate {folder / bundle.POISON} --name NAME`, and submit that",
            file=sys.stderr,
        )
    if as_json:
        print(
            json.dumps({"bundle": str(target), "manifest": manifest.model_dump(mode="json")}, indent=1)
        )
    else:
        print(target)


def verify(
    bundle: Annotated[
        Path | None, typer.Argument(help="A bundle, or the folder of a record in the results.")
    ] = None,
    secret: Annotated[
        Path | None,
        typer.Option(
            help="File with the maintainer's secret."
            " [default: the one in POISONBENCH_SECRET, else the user's configuration folder]"
        ),
    ] = None,
    new_secret: Annotated[
        bool, typer.Option("--new-secret", help="Make a secret, print its hash, and do nothing else.")
    ] = False,
    results: ResultsOption = Path("results"),
    seeds: Annotated[
        int | None, typer.Option(help="Hidden seeds per recipe, for a trial. [default: the track's]")
    ] = None,
    trust_name: Annotated[
        bool, typer.Option("--trust-name", help="Let the entry be called like what is here already.")
    ] = False,
    data_dir: DataDirOption = None,
    out: OutOption = Path("runs"),
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Hold a bundle's claim against victims of hidden seeds, and put the entry among the results.

    Nothing in the bundle is believed. Exit code 3: the claim exceeds the measurement; the entry is
    written all the same, so that the leaderboard shows it flagged.
    """
    from poisonbench.submission import secret as secrets
    from poisonbench.submission import verify as verifying

    path = secret or secrets.default_path()
    if new_secret == (bundle is not None):
        raise UserError("name a bundle to verify, or pass --new-secret alone")
    if bundle is None:
        print(secrets.digest(secrets.create(path)))
        print(f"kept in {path}: keep a copy, and publish the hash above", file=sys.stderr)
        return
    known = secrets.load(path)
    by = verifying.Maintainer(
        known, results, out, data_dir, command(), seeds, trust_name=trust_name, fresh=fresh
    )
    verified = verifying.verify(bundle, by)
    flagged = verified.verification.flagged(verified.record)
    if as_json:
        print(json.dumps(_as_json(verified), indent=1))
    else:
        _show(verified)
    if flagged:
        raise typer.Exit(FLAGGED)


def dispute(
    folder: Annotated[Path, typer.Argument(help="An entry in the results: a folder with a record.")],
    reason: Annotated[str, typer.Option(help="What does not hold, in a sentence.")],
    author: Annotated[str, typer.Option(help="Who says so.")],
    evidence: Annotated[
        str,
        typer.Option(
            help="An address; or the record or verification of another measurement of the same poison."
        ),
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Record a result that breaks an entry: it is marked on the leaderboard, never deleted."""
    from poisonbench.submission import disputes

    path, said = disputes.dispute(folder, reason, author, evidence)
    if as_json:
        print(json.dumps({"dispute": str(path), **said.model_dump(mode="json")}, indent=1))
    else:
        print(path)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(2**20).decode("utf-8").replace("\r\n", "\n").strip()
    except OSError as error:
        raise UserError(f"cannot read --bibtex {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--bibtex {path} is not text in UTF-8") from None


def _as_json(verified: Verified) -> dict[str, object]:
    record, measured = verified.record, verified.verification
    excess = measured.excess(record)
    return {
        "folder": str(verified.folder),
        "flagged": measured.flagged(record),
        "drops": {
            victim.recipe_name: {
                "claimed": claimed.drop.model_dump(),
                "measured": victim.drop.model_dump(),
                "excess": excess[victim.recipe_name].model_dump(),
            }
            for victim in measured.victims
            if (claimed := record.victim(victim.recipe_name)) is not None
        },
        "verification": measured.model_dump(mode="json"),
    }


def _show(verified: Verified) -> None:
    """Claimed beside measured, recipe by recipe."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    record, measured = verified.record, verified.verification
    seeds, flagged = len(measured.victims[0].seeds), measured.flagged(record)
    table = Table(
        box=box.SIMPLE_HEAD,
        title=escape(f"{record.attack} on {record.track}: {record.budget.game()}"),
        caption=f"Drops in points with 95 % intervals, over {len(record.victims[0].seeds)} claimed and"
        f" {seeds} hidden seeds; claimed too much with a 99 % interval.",
    )
    table.add_column("victim", no_wrap=True)
    for column in ("claimed", "measured", "claimed too much"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for name, excess in measured.excess(record).items():
        mine, claimed = (of.victim(name) for of in (measured, record))
        assert mine is not None
        assert claimed is not None
        word = "FLAGGED" if name in flagged else "holds"
        table.add_row(name, str(claimed.drop), str(mine.drop), str(excess), word)
    console = Console(highlight=False)
    console.print(table)
    if seeds < len(record.victims[0].seeds):
        console.print(f"a trial: the claim has {len(record.victims[0].seeds)} seeds")
    if verified.manifest is not None:
        console.print(escape(f"by {', '.join(verified.manifest.authors)}"))
    console.print(escape(str(verified.folder)), soft_wrap=True)
