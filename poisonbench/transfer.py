"""How far a poison carries: what victims lose to it that it was not crafted against.

A track names such victims: a wider and a narrower ResNet-9, some that other optimizers train, learned
ones among them, and a plain network of another shape. They are measured in pairs like all others, on the
evaluation seeds of the run, and kept beside its record in a file of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from poisonbench import compute, data, harness
from poisonbench._files import require_writable
from poisonbench.errors import UserError
from poisonbench.records import Record, VictimScores
from poisonbench.stored import Hash, Measured, Seconds, code_version, provenance
from poisonbench.threat import PoisonSet
from poisonbench.tracks import TRACKS

FILE = "transfer.json"


class Transfer(Measured):
    """Scores of one poison on the transfer victims of its track.

    Attributes:
        poison_hash: content hash of the poison file.
        victims: scores, recipe by recipe.
        evaluation_seconds: wall time on `hardware`.
    """

    schema_version: Literal[1] = 1
    poison_hash: Hash
    victims: list[VictimScores] = Field(min_length=1)
    evaluation_seconds: Seconds

    def is_of(self, record: Record) -> bool:
        """Whether these are scores of this record's poison, on its seeds, by the recipes of today."""
        track = TRACKS.get(record.track)
        if track is None or self.poison_hash != record.poison_hash:
            return False
        now = {name: recipe.as_dict() for name, recipe in track.transfer.items()}
        return {v.recipe_name: v.whole_recipe for v in self.victims} == now and all(
            v.seeds == record.victims[0].seeds for v in self.victims
        )


def measure(
    folder: Path, data_dir: str | None, out: Path, command: str, *, fresh: bool = False
) -> Transfer:
    """Train the transfer victims of a finished run's track, and write `transfer.json` beside its record.

    Args:
        folder: of the run; what it holds already is not measured again.
        data_dir: where TFDS sets lie on this machine.
        out: folder for runs, where finished groups of victims are kept.
        command: what the user typed.
        fresh: measure again what is there.

    Raises:
        UserError: there is no finished run, its victims were defended, its track is gone, or its poison
            or its data are not those of its record.
    """
    record, poison = Record.load(folder / "record.json"), PoisonSet.load(folder / "poison.safetensors")
    if record.defense != "none":
        raise UserError(
            f"{folder} scored victims under {record.defense}, and transfer is measured on undefended"
            " ones: name a run of the same poison without --defense"
        )
    record.require(poison, folder)
    path = folder / FILE
    if path.exists() and not fresh and (stored := Transfer.load(path)).is_of(record):
        return stored
    track = TRACKS.get(record.track)
    if track is None:
        raise UserError(f"{folder} is of the track {record.track}, which is no longer there")
    require_writable(folder)
    code_version()  # as in a run: what is committed meanwhile is not what runs
    compute.setup()
    dataset = data.load(record.dataset, data_dir)
    if dataset.hashes() != record.hashes:
        raise UserError(f"the data are not those that {folder} was measured on: name their --data-dir")
    seeds = record.victims[0].seeds
    kept = out / track.name / "victims"
    done = harness.evaluate(dataset, poison, dict(track.transfer), seeds, kept, reuse=not fresh)
    transfer = Transfer(
        poison_hash=poison.hash, victims=done.victims, evaluation_seconds=round(done.seconds, 1),
        **provenance(command),
    )  # fmt: skip
    transfer.save(path)
    return transfer
