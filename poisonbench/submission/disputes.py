"""Disputes: an entry that does not hold is marked, with the reason, and stays."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import ValidationError

from poisonbench import verification
from poisonbench.errors import UserError, plain
from poisonbench.records import Record
from poisonbench.stored import now
from poisonbench.texts import URL
from poisonbench.verification import Dispute, Verification


def dispute(folder: Path, reason: str, author: str, evidence: str = "") -> tuple[Path, Dispute]:
    """Write a dispute beside the record that it is about.

    Args:
        folder: of the record, in the results.
        reason: what does not hold.
        author: who says so.
        evidence: an address; or a record or verification on this machine that is of the same poison, of
            which a copy is kept beside the dispute.

    Returns:
        The new file, and what it says.

    Raises:
        UserError: there is no record, the evidence cannot be had or is of another poison, a text is too
            long, or nothing can be written.
    """
    record = Record.load(folder / "record.json")
    number = 1 + max((_number(path) for path in folder.glob(verification.DISPUTES)), default=0)
    shown = None if not evidence or re.fullmatch(URL, evidence) else _evidence(Path(evidence), record)
    try:
        said = Dispute(
            poison_hash=record.poison_hash, reason=reason, author=author, created=now(),
            evidence=evidence if shown is None else f"evidence-{number}.json",
        )  # fmt: skip
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        raise UserError(f"--{problem['loc'][0]}: {plain(problem['msg'])}") from None
    if shown is not None:
        shown.save(folder / said.evidence)
    path = folder / f"dispute-{number}.json"
    said.save(path)
    return path, said


def _evidence(path: Path, record: Record) -> Record | Verification:
    if not path.is_file():
        raise UserError(f"--evidence {plain(str(path), 200)} is neither an address nor a file")
    try:
        shown: Record | Verification = Verification.load(path)
    except UserError:
        shown = Record.load(path)
    if shown.poison_hash != record.poison_hash:
        raise UserError(f"--evidence {path} is of another poison than the record that it is about")
    return shown


def _number(path: Path) -> int:
    digits = path.stem.removeprefix("dispute-")
    return int(digits) if re.fullmatch("[0-9]{1,6}", digits) else 0
