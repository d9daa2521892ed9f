"""What every stored file is made of: bounded types, how it is read and written, and where it came from.

Anybody may have written a file that is read back, so every number and every text has an end.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_serializer,
)

from poisonbench import __version__
from poisonbench._files import write_text
from poisonbench.errors import UserError, plain

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "scikit-learn", "pillow")


# Names become folders and rows of tables, and a record may come from anybody.
NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
DEFENSE = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}(\+[A-Za-z0-9][A-Za-z0-9_-]{0,63}){0,7}$"
Name = Annotated[str, Field(pattern=NAME)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Percent = Annotated[float, Field(ge=0, le=100, strict=True)]
# The upper ends are far beyond all that is meant, and keep arithmetic on a stranger's numbers finite.
Count = Annotated[int, Field(ge=0, le=10**9)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
Brief = Annotated[str, Field(max_length=1000)]
Long = Annotated[str, Field(max_length=10_000)]
MAX_BYTES = 2**24
"""Of a stored file; the longest that runs have written has 66 kB."""


def _of_our_time(moment: datetime) -> datetime:
    if not 2000 <= moment.year < 3000:  # at the ends of the calendar a change of time zone overflows
        raise ValueError("no date of this millennium")
    return moment


Moment = Annotated[AwareDatetime, AfterValidator(_of_our_time)]


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    json.dumps(values, allow_nan=False)  # raises ValueError for what a record may not hold
    return values


Config = Annotated[dict[str, Any], AfterValidator(_finite)]
Code = Annotated[dict[Brief, Brief | bool | None], Field(max_length=100)]
Libraries = Annotated[dict[Brief, Brief], Field(max_length=100)]


class Frozen(BaseModel):
    """Immutable, without unknown fields, without NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Kept = TypeVar("Kept", bound="Stored")


class Stored(Frozen):
    """What is kept in a JSON file of its own.

    Attributes:
        kind: what errors call it.
    """

    kind: ClassVar[str] = "record"

    def save(self, path: Path) -> None:
        """Write the record, whole or not at all."""
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls: type[Kept], path: Path) -> Kept:
        """Read a record that anybody may have written.

        Raises:
            UserError: it cannot be read, has more than `MAX_BYTES`, or is not a record.
        """
        try:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls: type[Kept], data: bytes, where: str) -> Kept:
        """Make sense of bytes that anybody may have written.

        Args:
            data: JSON.
            where: what errors call them.

        Raises:
            UserError: they are more than `MAX_BYTES`, or not a record.
        """
        if len(data) > MAX_BYTES:
            raise UserError(f"{where} is not a valid {cls.kind} (it has more than {MAX_BYTES} bytes)")
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            place = plain(".".join(map(str, problem["loc"])) or "file", 100)
            what = f"{place}: {plain(problem['msg'])}"
            raise UserError(f"{where} is not a valid {cls.kind} ({what})") from None


class Hardware(Frozen):
    """Where it ran."""

    system: Brief
    processor: Brief
    cores: Count
    device: Brief


class Measured(Stored):
    """What says where it came from.

    Attributes:
        created: when it was finished.
        command: what reproduces it.
        code: version of poisonbench; the git commit and whether the tree was dirty, where known.
        libraries: versions of what decides the numbers.
        hardware: where it ran, and what its seconds are of.
    """

    created: Moment
    command: Long
    code: Code
    libraries: Libraries
    hardware: Hardware

    @model_serializer(mode="wrap")
    def _provenance_last(self, told: Callable[[Any], Any]) -> dict[str, Any]:
        """What was measured comes first, for those who read the file."""
        fields: dict[str, Any] = told(self)
        return {name: fields[name] for name in sorted(fields, key=Measured.model_fields.__contains__)}


def provenance(command: str) -> dict[str, Any]:
    """The fields of `Measured`, here and now."""
    return {
        "created": now(), "command": command, "code": code_version(),
        "libraries": library_versions(), "hardware": hardware(),
    }  # fmt: skip


def now() -> datetime:
    """The time in UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0)


@cache
def code_version() -> dict[str, str | bool | None]:
    """Version, and commit and dirty flag where this runs from a checkout, as they were when first asked.

    Ask before anything long: what is committed meanwhile is not what runs.
    """
    root = Path(__file__).resolve().parents[1]
    commit = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    dirty = None if commit is None else bool(_git(root, "status", "--porcelain"))
    return {"version": __version__, "commit": commit, "dirty": dirty}


def library_versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), **versions}


def hardware() -> Hardware:
    """This machine, as JAX sees it."""
    import jax

    processor = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass  # not Linux: the general name will do
    device = jax.devices()[0]
    return Hardware(
        system=f"{platform.system()} {platform.machine()}",
        processor=processor,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        device=f"{device.platform}: {device.device_kind}",
    )


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
