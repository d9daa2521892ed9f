"""Bundles that mean harm, or are merely broken: every one is refused before it can do anything.

Each case is made from a good bundle by one change, with hashes and sizes made right again wherever that
is possible, so that only the named defect is left. Of each it is tested that its verification

- ends with a `UserError` of one printable line of bounded length that says what is wrong;
- trains no victim, writes nothing, be it among the results or among temporary files, and runs nothing;
- allocates less than 32 MiB, whatever the bundle promises.

At the command line that is exit code 2 and the line on standard error. The good bundle passes, so it is
not the reader that refuses everything. And a plugin that takes the name of an attack of ours is refused
without being imported.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import tempfile
import tracemalloc
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import bundles
import pytest
from commandline import Run, refused
from hostile_archives import ARCHIVES
from hostile_members import MANIFESTS, POISONS, RECORDS
from safetensors.numpy import save

from poisonbench import _plugins, harness
from poisonbench.data import load
from poisonbench.errors import UserError
from poisonbench.submission import bundle, secret
from poisonbench.submission.verify import Maintainer, verify
from poisonbench.threat import PoisonSet

LIMIT = 2**25
CASES = ARCHIVES | MANIFESTS | RECORDS | POISONS


@pytest.fixture(autouse=True)
def maintainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bundles.shrink(monkeypatch)
    monkeypatch.setenv("POISONBENCH_SECRET", str(tmp_path / "secret"))
    secret.create(tmp_path / "secret")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    load(bundles.SPEC)  # what is imported and kept on the first time is not the bundle's doing


def test_there_are_enough() -> None:
    groups = (ARCHIVES, MANIFESTS, RECORDS, POISONS)
    assert len(CASES) == sum(len(group) for group in groups) > 40


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_in_one_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "evaluate", lambda *_, **__: pytest.fail("victims were trained"))
    monkeypatch.chdir(tmp_path)
    by = Maintainer(bytes(32), Path("results"), Path("runs"), None, "poisonbench verify")
    make, hint = CASES[case]
    path = tmp_path / "theirs.zip"
    if case == "beyond all limits":
        with path.open("wb") as file:
            file.truncate(2**31)
    else:
        path.write_bytes(make())
    before = bundles.everything(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            verify(path, by)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert re.search(hint, message), message
    assert message.isprintable()
    assert len(message) < 1100
    assert peak < LIMIT
    assert bundles.everything(tmp_path) == before
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize(
    "case", ["a bomb", "an unknown field with escape sequences", "another test set", "a pickled poison"]
)
def test_at_the_command_line_too(case: str, command: Run, tmp_path: Path) -> None:
    make, hint = CASES[case]
    (tmp_path / "theirs.zip").write_bytes(make())
    before = bundles.everything(tmp_path)
    message = refused(command, "verify", "theirs.zip")
    assert re.search(hint, message), message
    assert message.isprintable()
    assert bundles.everything(tmp_path) == before


def test_the_good_one_passes(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*arguments: Any, **_: Any) -> harness.Evaluation:
        _, _, recipes, seeds, _ = arguments
        drops = [3.0, 4.0] * (len(seeds) // 2)
        return harness.Evaluation([bundles.scores(n, list(seeds), drops) for n in recipes], 1.0)

    monkeypatch.setattr(harness, "evaluate", measured)
    path = tmp_path / "theirs.zip"
    path.write_bytes(bundles.bundle())
    read = bundle.read(path)
    assert (read.manifest.name, read.poison.hash) == ("theirs", bundles.poison().hash)
    code, _, err = command("verify", str(path))
    assert code == 0, err
    assert not list((tmp_path / "temporary").iterdir())


def test_what_is_no_file_is_refused(command: Run, tmp_path: Path) -> None:
    assert "cannot read nowhere.zip" in refused(command, "verify", "nowhere.zip")
    (tmp_path / "empty").mkdir()
    assert "cannot read empty/record.json" in refused(command, "verify", "empty")


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes in the file system")
def test_a_pipe_is_not_waited_for(command: Run, tmp_path: Path) -> None:
    subprocess.run(["mkfifo", str(tmp_path / "theirs.zip")], check=True)
    assert "is no file" in refused(command, "verify", "theirs.zip")
    assert "is no file" in refused(command, "evaluate", "theirs.zip")


def test_nothing_of_a_stranger_s_bytes_is_kept(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are written anew: what a stranger hid beside what is read does not reach the results."""

    def measured(*arguments: Any, **_: Any) -> harness.Evaluation:
        _, _, recipes, seeds, _ = arguments
        drops = [3.0, 4.0] * (len(seeds) // 2)
        return harness.Evaluation([bundles.scores(n, list(seeds), drops) for n in recipes], 1.0)

    monkeypatch.setattr(harness, "evaluate", measured)
    made, hidden = bundles.poison(), base64.b64encode(b"hidden here by a stranger")
    claim = bundles.record(made).model_dump_json().encode()
    twice = b'{"remark": "' + hidden + b'", ' + claim[1:]  # the same field comes again
    arrays = {"images": made.images, "indices": made.indices, "labels": made.labels}
    header = {
        "format": "poisonbench-poison-1", "budget": made.budget.model_dump_json(),
        "train_hash": made.train_hash, "hash": made.hash, "more": hidden.decode(),
    }  # fmt: skip
    data = save(arrays, {"poisonbench": json.dumps(header), "more": hidden.decode()})
    path = tmp_path / "theirs.zip"
    path.write_bytes(bundles.bundle(data, twice))
    assert hidden in path.read_bytes()
    assert command("verify", str(path))[0] == 0
    written = [p.read_bytes() for p in (tmp_path / "results").rglob("*") if p.is_file()]
    assert len(written) == 4
    assert not any(hidden in each for each in written)
    (kept,) = (tmp_path / "results").rglob("poison.safetensors")
    assert PoisonSet.load(kept).hash == made.hash


def test_a_plugin_may_not_take_an_attack_s_name(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_plugin.py").write_text("from pathlib import Path\nPath('executed').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint("mgd", "their_plugin:Attack", "poisonbench.attacks")]
    monkeypatch.setattr(_plugins, "entry_points", lambda group: [p for p in points if p.group == group])
    (tmp_path / "theirs.zip").write_bytes(bundles.bundle())
    before = bundles.everything(tmp_path)
    for words in (["verify", "theirs.zip"], ["list"], ["run", "--attack", "mgd"]):
        assert "takes the name 'mgd', which is in use" in refused(command, *words)
    assert bundles.everything(tmp_path) == before
    assert "their_plugin" not in sys.modules
