"""The maintainer's secret, and the seeds that follow from it.

Victims that decide about a claim are trained on seeds that nobody could have tuned a poison to: seed
`i` is the first 32 bits of HMAC-SHA256(secret, poison hash ‖ `:` ‖ i). Whoever changes the poison
changes the seeds; who knows the seeds of one poison knows nothing of another's; and the maintainer,
bound by the secret's published hash, cannot choose them either.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Container
from pathlib import Path

import platformdirs

from poisonbench._files import unwritable
from poisonbench.errors import UserError

VARIABLE = "POISONBENCH_SECRET"
BYTES = 32


def default_path() -> Path:
    """The file that POISONBENCH_SECRET names in the environment, or one in the user's configuration."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else platformdirs.user_config_path("poisonbench", False) / "secret"


def create(path: Path) -> bytes:
    """Draw a secret of 32 bytes and keep it, in hexadecimal, in a file that only its owner reads.

    Raises:
        UserError: there is one already, or the file cannot be written.
    """
    secret = secrets.token_bytes(BYTES)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise UserError(
            f"{path} is there already: past verifications need it, so move it away yourself"
        ) from None
    except OSError as error:
        raise unwritable(path, error) from None
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(f"{secret.hex()}\n")
    return secret


def load(path: Path) -> bytes:
    """Read the secret.

    Raises:
        UserError: there is none, others can read it, or the file holds something else.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(2 * BYTES + 3)
    except OSError as error:
        raise UserError(
            f"cannot read the secret {path} ({error.strerror}): make one by `poisonbench verify"
            " --new-secret`, or name its file by --secret"
        ) from None
    if os.name == "posix" and stat.S_IMODE(mode) & 0o077:
        raise UserError(f"others can read the secret {path}: `chmod 600` it, or make a new one")
    try:
        secret = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        secret = b""
    if len(secret) != BYTES:
        raise UserError(f"{path} holds no secret, which is {2 * BYTES} hexadecimal digits")
    return secret


def digest(secret: bytes) -> str:
    """SHA-256 of the secret, which may be published: it binds whoever has it, and tells nothing."""
    return hashlib.sha256(secret).hexdigest()


def hidden_seeds(secret: bytes, poison_hash: str, count: int, public: Container[int] = ()) -> list[int]:
    """Seeds of 32 bits that follow from a secret and a poison, no two alike.

    Args:
        secret: the maintainer's.
        poison_hash: content hash of the poison, in hexadecimal.
        count: how many.
        public: seeds to leave out, those of the claim.
    """
    seeds: list[int] = []
    number = 0
    while len(seeds) < count:
        code = hmac.digest(secret, f"{poison_hash}:{number}".encode(), "sha256")
        seed = int.from_bytes(code[:4], "big")
        if seed not in public and seed not in seeds:
            seeds.append(seed)
        number += 1
    return seeds
