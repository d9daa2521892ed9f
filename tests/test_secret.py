"""The maintainer's secret, and the seeds that follow from it.

Claims of `poisonbench.submission.secret` tested here:

- hidden seeds are those of HMAC-SHA256, follow from secret and poison alone, are no two alike and no
  public ones, and every one makes another key;
- the secret is for its owner's eyes, is never written over and never shown, and is refused where others
  can read it or where its file holds something else.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from pathlib import Path

import jax
import pytest
from commandline import Run, refused

from poisonbench import harness
from poisonbench.submission import secret


def test_hidden_seeds_follow_from_secret_and_poison() -> None:
    key, poison_hash = bytes(range(32)), "ab" * 32
    first = hmac.new(key, f"{poison_hash}:0".encode(), hashlib.sha256).digest()[:4]
    seeds = secret.hidden_seeds(key, poison_hash, 10)
    assert seeds[0] == int.from_bytes(first, "big")
    assert seeds == secret.hidden_seeds(key, poison_hash, 20)[:10]
    assert len(set(seeds)) == 10
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert not set(seeds) & set(secret.hidden_seeds(key, "ac" * 32, 10))
    assert not set(seeds) & set(secret.hidden_seeds(bytes(32), poison_hash, 10))
    without = secret.hidden_seeds(key, poison_hash, 10, public=seeds[:1])
    assert without[:9] == seeds[1:]
    keys = [jax.random.key_data(harness.evaluation_key(seed)) for seed in (seeds[0], 2**32 - 1, 0)]
    assert len({str(each) for each in keys}) == 3


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
def test_the_secret_is_private_and_stays(command: Run, tmp_path: Path) -> None:
    path = tmp_path / "config" / "their secret"
    code, out, err = command("verify", "--new-secret", "--secret", str(path))
    assert code == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    known = secret.load(path)
    assert len(known) == 32
    assert out.strip() == hashlib.sha256(known).hexdigest()
    assert known.hex() not in out + err
    assert "is there already" in refused(command, "verify", "--new-secret", "--secret", str(path))
    assert secret.load(path) == known
    path.chmod(0o640)
    assert "chmod 600" in refused(command, "verify", "x.zip", "--secret", str(path))
    path.chmod(0o600)
    for text in (b"", b"abc", known.hex().encode()[:-2], b"\xff" * 64, known.hex().encode() * 2):
        path.write_bytes(text)
        assert "holds no secret" in refused(command, "verify", "x.zip", "--secret", str(path))
    assert "--new-secret" in refused(command, "verify", "x.zip", "--secret", "nowhere")
    assert "--new-secret" in refused(command, "verify")
    assert "--new-secret" in refused(command, "verify", "x.zip", "--new-secret")
