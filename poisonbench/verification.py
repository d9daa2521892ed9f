"""What became of a claim: the verification and the disputes that lie beside a record.

A record says what its author measured. A maintainer trains victims anew on seeds that nobody could have
tuned to, and keeps what they scored in `verification.json`; whoever finds that an entry does not hold
leaves a `dispute-….json`. Neither changes the record, and a disputed one is marked, never deleted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from poisonbench.records import Record, VictimScores
from poisonbench.statistics import CERTAIN, Interval, excess_interval
from poisonbench.stored import Hash, Measured, Moment, Seconds, Stored
from poisonbench.texts import URL, Line, Text

FILE = "verification.json"
DISPUTES = "dispute-*.json"
FILE_NAME = "[A-Za-z0-9][A-Za-z0-9_-]{0,63}[.]json"


class Verification(Measured):
    """A maintainer's measurement of somebody's poison.

    Attributes:
        poison_hash: content hash of the poison file.
        victims: scores on hidden seeds, recipe by recipe, as the record has them on its own.
        secret_hash: SHA-256 of the maintainer's secret that the seeds were derived from, so that it can
            be shown later to have been one secret all along.
        evaluation_seconds: wall time on `hardware`.
        command: what reproduces it, given the secret.
        code: version of poisonbench; the git commit and whether the tree was dirty, where known.
    """

    kind: ClassVar[str] = "verification"
    schema_version: Literal[1] = 1
    poison_hash: Hash
    victims: list[VictimScores] = Field(min_length=1)
    secret_hash: Hash
    evaluation_seconds: Seconds

    def victim(self, name: str) -> VictimScores | None:
        """The scores on the recipe of that name, if it was measured."""
        return next((v for v in self.victims if v.recipe_name == name), None)

    def excess(self, record: Record) -> dict[str, Interval]:
        """By how much a record claims more than was measured, in points, for each recipe of both.

        An interval at 99 %, from the measured spread alone, or that of one test image where it is less.
        """
        step = 100 / record.dataset.test_size if record.dataset.test_size else 0.0
        return {
            mine.recipe_name: excess_interval(claimed.drops, mine.drops, CERTAIN, step)
            for mine in self.victims
            if (claimed := record.victim(mine.recipe_name)) is not None
        }

    def flagged(self, record: Record) -> list[str]:
        """The recipes on which a record claims more than the measurement allows."""
        return [name for name, excess in self.excess(record).items() if excess.low > 0]


class Dispute(Stored):
    """A result that breaks an entry.

    Attributes:
        poison_hash: of the entry's poison.
        reason: what does not hold, in a sentence.
        evidence: where it can be seen: an address, or the file name of a measurement kept beside it.
        author: who says so.
    """

    kind: ClassVar[str] = "dispute"
    schema_version: Literal[1] = 1
    poison_hash: Hash
    reason: Annotated[Text, Field(min_length=1)]
    evidence: Annotated[str, Field(pattern=rf"^({FILE_NAME}|{URL})?$")] = ""
    author: Line
    created: Moment


def verification_of(folder: Path, record: Record) -> Verification | None:
    """The verification beside a record, if there is one of its poison.

    Raises:
        UserError: the file is not valid.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    found = Verification.load(path)
    return found if found.poison_hash == record.poison_hash else None


def disputes_of(folder: Path, record: Record) -> list[Dispute]:
    """The disputes beside a record that are of its poison, in the order in which they were raised.

    Raises:
        UserError: a file is not valid.
    """
    found = [Dispute.load(path) for path in sorted(folder.glob(DISPUTES))]
    return sorted((d for d in found if d.poison_hash == record.poison_hash), key=lambda d: d.created)
