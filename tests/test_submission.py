"""An entry's way: packed by its author, and measured by a maintainer on seeds that nobody knew.

Claims of `poisonbench.submission` tested here:

- a bundle is a function of the run and of its author's words, and what is read is what was packed; it
  holds neither pictures nor tables, and is not written over another file;
- runs that no table ranks, that are marked, defended or of another poison are refused with the fix;
- victims are trained on the hidden seeds of secret and poison, and the secret is in nothing published;
- an honest claim is flagged about as seldom as its interval says, one inflated by two points all but
  always, whatever spread it claims; a flagged entry is written too, with exit code 3;
- the entry holds the claim as it was, the poison, the author's words and the measurement; the same
  command again measures nothing, and other entries are never written over;
- a name that passes for an attack or for an entry of others is refused, unless it is trusted; the
  tables say of an entry that it was submitted, and take it for no control.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest
from commandline import Run, refused

from poisonbench import harness, tracks
from poisonbench.errors import UserError
from poisonbench.records import Record
from poisonbench.submission import bundle, secret
from poisonbench.submission.bundle import About
from poisonbench.submission.manifest import entry_of
from poisonbench.threat import PoisonSet
from poisonbench.tracks import TRACKS
from poisonbench.verification import Verification

HERE = Path(__file__).parents[1]
ABOUT = About(title="Theirs", authors=["Ada Lovelace"])
SPREAD = 0.64
"""Standard deviation of a drop between seeds, in points: that of mgd on the digits track."""


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bundles.shrink(monkeypatch)
    path = tmp_path / "private" / "secret"
    monkeypatch.setenv("POISONBENCH_SECRET", str(path))
    secret.create(path)


def drops(mean: float, rng: np.random.Generator | None = None) -> list[float]:
    rng = rng or np.random.default_rng(0)
    return [round(float(d), 6) for d in rng.normal(mean, SPREAD, 10)]


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[list[int]]]:
    """Lets victims lose so many points, without training any; gives the seeds that were asked for."""
    asked: list[list[int]] = []

    def set_up(mean: float) -> list[list[int]]:
        def measured(*arguments: Any, **_: Any) -> harness.Evaluation:
            _, poison, recipes, seeds, _ = arguments
            assert isinstance(poison, PoisonSet)
            asked.append(list(seeds))
            lost = drops(mean, np.random.default_rng(1))[: len(seeds)]
            return harness.Evaluation([bundles.scores(n, list(seeds), lost) for n in recipes], 1.0)

        monkeypatch.setattr(harness, "evaluate", measured)
        return asked

    return set_up


def packed(folder: Path, **changes: Any) -> Path:
    run = bundles.run_folder(folder / "run", **changes)
    return bundle.pack(run, ABOUT, folder / "theirs.zip")[0]


def test_a_bundle_is_a_function_of_run_and_words(tmp_path: Path) -> None:
    run = bundles.run_folder(tmp_path / "run")
    (run / "poisons.png").write_bytes(b"a picture")
    (run / "accuracies.csv").write_text("a table")
    first, said = bundle.pack(run, ABOUT, tmp_path / "a.zip")
    second, _ = bundle.pack(run, ABOUT, tmp_path / "b.zip")
    assert first.read_bytes() == second.read_bytes()
    assert bundle.pack(run, ABOUT, tmp_path / "a.zip")[0] == first
    with zipfile.ZipFile(first) as file:
        assert tuple(file.namelist()) == bundles.MEMBERS == tuple(bundle.LIMITS)
        assert file.testzip() is None
    read = bundle.read(first)
    assert read.manifest == said
    assert read.record == Record.load(run / "record.json")
    assert read.poison.hash == PoisonSet.load(run / "poison.safetensors").hash
    assert said.files["poison.safetensors"].size == (run / "poison.safetensors").stat().st_size
    other = About(title="Other", authors=["Ada Lovelace"])
    with pytest.raises(UserError, match="is there already"):
        bundle.pack(run, other, first)
    assert first.read_bytes() == second.read_bytes()


def test_the_limits_hold_every_image_of_every_track() -> None:
    side = {"digits": 8, "tfds:cifar10": 32}
    for track in TRACKS.values():
        assert track.dataset.train_size is not None
        pixels = 3 * (track.dataset.resolution or side[track.dataset.name]) ** 2
        assert 2 * track.dataset.train_size * (pixels + 12) < bundle.LIMITS["poison.safetensors"]


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"custom": ["seeds"]}, "is custom .seeds., and no table ranks it: run the attack on the track"),
        ({"drops": [3.0, 4.0]}, "is custom .seeds unlike the track's"),
        ({"surrogate": "standard"}, "is custom .surrogate unlike"),
        ({"track": "digit"}, "no track called 'digit'; did you mean digits"),
        ({"defense": "mixup"}, "is of victims defended by mixup: submit the run .* without --defense"),
        ({"status": "invalid", "remark": "wrong"}, "is marked invalid"),
        ({"poison_hash": "0" * 64}, "holds another poison"),
        ({"num_poison": 9}, "states another budget, number of poisons or training set"),
    ],
)
def test_a_run_that_cannot_stand_as_a_claim(changes: dict[str, Any], hint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=hint):
        packed(tmp_path, **changes)
    assert not (tmp_path / "theirs.zip").exists()


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--author", "Ada\x1b[2J"], "--author: .*control characters"),
        (["--author", "A", "--author", ""], "--author: "),
        (["--author", "A", "--title", "x" * 101], "--title: .*100 char"),
        (["--author", "A", "--description", "x" * 2001], "--description: .*2000 char"),
        (["--author", "A", "--description", "see [x](y)"], "--description: .*without HTML or Markdown"),
        (["--author", "A", "--title", "<b>A</b>"], "--title: .*without HTML or Markdown"),
        (["--author", "A", "--paper", "javascript:alert(1)"], "--paper: "),
        (["--author", "A", "--code", "example.org"], "--code: "),
        (["--author", "A", "--licence", "any, really"], "--licence: "),
        (["--author", "A", "--bibtex", "nowhere.bib"], "cannot read --bibtex nowhere.bib"),
        (["--author", "A", "--bibtex", "run/record.json"], "--bibtex: "),
        (["--author", "A", "--out", "run/record.json"], "run/record.json is there already"),
        ([], "--author"),
    ],
)
def test_words_that_no_entry_may_have(words: list[str], hint: str, command: Run, tmp_path: Path) -> None:
    bundles.run_folder(tmp_path / "run")
    before = bundles.everything(tmp_path)
    message = refused(command, "submit", "run", *words)
    assert re.search(hint, message), message
    assert bundles.everything(tmp_path) == before


def test_submit_takes_the_words_of_its_options(command: Run, tmp_path: Path) -> None:
    bundles.run_folder(tmp_path / "run", code={"version": "0.1.0", "commit": "a", "dirty": True})
    (tmp_path / "their.bib").write_bytes(b"@misc{theirs,\r\n\ttitle = {A {<}b{>}}}\r\n")
    words = [
        "--author", "Ada Lovelace", "--author", "José Ñandú", "--title", "Black images",
        "--description", "Ten black images.\nNo more.", "--paper", "https://example.org/paper",
        "--code", "https://example.org/code", "--bibtex", "their.bib", "--licence", "CC-BY-4.0",
    ]  # fmt: skip
    code, out, err = command("submit", "run", *words)
    assert code == 0, err
    assert "was not committed" in err
    said = bundle.read(tmp_path / out.strip()).manifest
    assert out.strip() == f"theirs-{bundles.poison().hash[:8]}.zip"
    assert (said.authors, said.title) == (["Ada Lovelace", "José Ñandú"], "Black images")
    assert said.bibtex == "@misc{theirs,\n\ttitle = {A {<}b{>}}}"
    assert (said.paper, said.code) == ("https://example.org/paper", "https://example.org/code")
    code, out, _ = command("submit", "run", *words, "--out", "b.zip", "--json")
    assert json.loads(out) == {"bundle": "b.zip", "manifest": said.model_dump(mode="json")}


def test_an_honest_claim_becomes_an_entry(
    command: Run, tmp_path: Path, measuring: Callable[[float], list[list[int]]]
) -> None:
    asked = measuring(3.4)
    path = packed(tmp_path, drops=drops(3.4))
    private = tmp_path / "private" / "secret"
    code, out, err = command("verify", str(path), "--secret", str(private))
    assert code == 0, err
    assert "holds" in out
    assert "FLAGGED" not in out
    poison = PoisonSet.load(tmp_path / "run" / "poison.safetensors")
    entry = tmp_path / "results" / "digits" / "theirs" / "none" / f"theirs-{poison.hash[:8]}"
    names = {"record.json", "poison.safetensors", "entry.json", "verification.json"}
    assert {p.name for p in (tmp_path / "results").rglob("*") if p.is_file()} == names
    assert Record.load(entry / "record.json") == Record.load(tmp_path / "run" / "record.json")
    assert PoisonSet.load(entry / "poison.safetensors").hash == poison.hash
    said = entry_of(entry)
    assert said is not None
    assert said.authors == ["Ada Lovelace"]
    measured = Verification.load(entry / "verification.json")
    assert asked == [secret.hidden_seeds(secret.load(private), poison.hash, 10)]
    assert all(victim.seeds == asked[0] for victim in measured.victims)
    assert measured.secret_hash == secret.digest(secret.load(private))
    written = b"".join(p.read_bytes() for p in entry.iterdir())
    for told in (secret.load(private).hex(), str(private)):
        assert told.encode() not in written

    before = {p: p.read_bytes() for p in bundles.everything(tmp_path) if p.is_file()}
    code, out, err = command("verify", str(path), "--json")
    assert (code, len(asked)) == (0, 1), "measured again"
    shown = json.loads(out)
    assert shown["flagged"] == []
    assert shown["drops"]["smooth"]["claimed"]["n"] == 10
    assert shown["verification"] == measured.model_dump(mode="json")
    assert {p: p.read_bytes() for p in bundles.everything(tmp_path) if p.is_file()} == before


def test_a_claim_of_two_points_more_is_flagged_and_kept(
    command: Run, tmp_path: Path, measuring: Callable[[float], list[list[int]]]
) -> None:
    measuring(3.4)
    path = packed(tmp_path, drops=drops(5.4))
    code, out, err = command("verify", str(path))
    assert code == 3, err
    assert out.count("FLAGGED") == 2
    (entry,) = (tmp_path / "results").rglob("verification.json")
    assert Verification.load(entry).flagged(Record.load(entry.parent / "record.json"))
    code, out, _ = command("verify", str(path), "--json")
    assert (code, json.loads(out)["flagged"]) == (3, ["smooth", "standard"])


def test_honest_claims_are_seldom_flagged_and_inflated_ones_always() -> None:
    rng = np.random.default_rng(1)
    made = bundles.poison()
    hidden = list(range(100, 110))
    now = bundles.record(made)
    flagged = {0.0: 0, 2.0: 0}
    for _ in range(300):
        measured = Verification(
            poison_hash=made.hash, victims=[bundles.scores("smooth", hidden, drops(3.4, rng))],
            secret_hash="0" * 64, evaluation_seconds=1.0, created=now.created, command="",
            code={}, libraries={}, hardware=now.hardware,
        )  # fmt: skip
        for inflation in flagged:
            claim = [bundles.scores("smooth", list(range(10)), drops(3.4 + inflation, rng))]
            flagged[inflation] += bool(measured.flagged(now.model_copy(update={"victims": claim})))
    # One in two hundred is expected, so 1.5 of 300; more than 6 would be a chance of one in a thousand.
    assert flagged[0.0] <= 6
    assert flagged[2.0] >= 298


def test_a_spread_that_was_made_up_hides_nothing() -> None:
    made = bundles.poison()
    measured = Verification(
        poison_hash=made.hash, victims=[bundles.scores("smooth", list(range(100, 110)), drops(3.4))],
        secret_hash="0" * 64, evaluation_seconds=1.0, created=bundles.record(made).created, command="",
        code={}, libraries={}, hardware=bundles.record(made).hardware,
    )  # fmt: skip
    wild = [-4.0, 15.0] * 5
    assert np.mean(wild) == pytest.approx(5.5)
    assert measured.flagged(bundles.record(made, wild)) == ["smooth"]
    alike = measured.victims[0].model_copy(update={"poisoned": measured.victims[0].clean})
    nothing = measured.model_copy(update={"victims": [alike]})  # no spread but that of the test's steps
    assert nothing.flagged(bundles.record(made, [0.0] * 10)) == []
    assert nothing.flagged(bundles.record(made, [1 / 6] * 10)) == []  # one image of 600
    assert nothing.flagged(bundles.record(made, [1 / 3] * 10)) == ["smooth"]


def test_fewer_seeds_are_a_trial_that_the_whole_measurement_replaces(
    command: Run, tmp_path: Path, measuring: Callable[[float], list[list[int]]]
) -> None:
    asked = measuring(3.4)
    path = str(packed(tmp_path, drops=drops(3.4)))
    assert "--seeds must be at least 2" in refused(command, "verify", path, "--seeds", "1")
    code, out, _ = command("verify", path, "--seeds", "3")
    assert code == 0
    assert "a trial: the claim has 10 seeds" in out
    assert command("verify", path)[0] == 0
    assert [len(seeds) for seeds in asked] == [3, 10]
    (stored,) = (tmp_path / "results").rglob("verification.json")
    assert len(Verification.load(stored).victims[0].seeds) == 10


def test_a_record_in_the_results_can_be_measured_in_its_place(
    command: Run, tmp_path: Path, measuring: Callable[[float], list[list[int]]]
) -> None:
    measuring(3.4)
    folder = bundles.run_folder(tmp_path / "results/digits/mgd/none/mgd-1", drops=drops(3.4))
    assert command("verify", "results/digits/mgd/none/mgd-1")[0] == 0
    assert {p.name for p in folder.iterdir()} == {
        "record.json",
        "poison.safetensors",
        "verification.json",
    }


def test_entries_are_never_written_over(
    command: Run, tmp_path: Path, measuring: Callable[[float], list[list[int]]]
) -> None:
    measuring(3.4)
    assert command("verify", str(packed(tmp_path, drops=drops(3.4))))[0] == 0
    before = {p: p.read_bytes() for p in bundles.everything(tmp_path / "results") if p.is_file()}
    bundles.run_folder(tmp_path / "run", drops=drops(3.5))
    other, _ = bundle.pack(tmp_path / "run", ABOUT, tmp_path / "other.zip")
    assert "entries are never overwritten" in refused(command, "verify", str(other))
    assert {p: p.read_bytes() for p in bundles.everything(tmp_path / "results") if p.is_file()} == before


@pytest.mark.parametrize("name", ["mgd", "MGD", "label-flip", "None"])
def test_an_attack_s_name_is_not_for_others(
    name: str, command: Run, tmp_path: Path, measuring: Callable[[float], list[list[int]]]
) -> None:
    measuring(3.4)
    path = str(packed(tmp_path, drops=drops(3.4), attack=name))
    before = bundles.everything(tmp_path)
    assert f"the entry's name '{name}' is that of the attack" in refused(command, "verify", path)
    assert bundles.everything(tmp_path) == before
    assert command("verify", path, "--trust-name")[0] == 0


def test_the_name_of_somebody_s_entry_is_not_for_others(
    command: Run, tmp_path: Path, measuring: Callable[[float], list[list[int]]]
) -> None:
    measuring(3.4)
    assert command("verify", str(packed(tmp_path, drops=drops(3.4))))[0] == 0
    changed = bundles.poison(images=bundles.poison().images + 1)
    run = bundles.run_folder(tmp_path / "second", changed, attack="Theirs", drops=drops(3.4))
    theirs, _ = bundle.pack(run, About(title="x", authors=["Eve"]), tmp_path / "eve.zip")
    assert "the entry's name 'Theirs' is that of" in refused(command, "verify", str(theirs))
    own, _ = bundle.pack(run, ABOUT, tmp_path / "own.zip")
    assert command("verify", str(own))[0] == 0


def test_tables_say_what_was_submitted_and_take_it_for_no_control(
    command: Run, tmp_path: Path, measuring: Callable[[float], list[list[int]]]
) -> None:
    measuring(3.4)
    path = packed(tmp_path, drops=drops(3.4), attack="noise", crafting_seconds=1.0)
    assert command("verify", str(path), "--trust-name")[0] == 0
    assert command("leaderboard")[0] == 0
    page = (tmp_path / "results" / "README.md").read_text()
    assert "noise (submitted)" in page
    assert "*noise" not in page
    assert "Controls missing: none, noise" in page


@pytest.mark.slow
def test_a_true_claim_holds_and_two_points_more_do_not(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten pairs of victims of each recipe are trained on hidden seeds, on the digits track as it is.

    The secret is fixed, for one true claim in a hundred is flagged by chance; and the claim is not the
    largest on record, for the luckiest of many draws does claim more than hidden seeds give it.
    """
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    private = tmp_path / "secret"
    private.touch(mode=0o600)
    private.write_text(hashlib.sha256(b"a secret for tests").hexdigest())
    monkeypatch.setenv("POISONBENCH_SECRET", str(private))
    stored = [
        (path.parent, found)
        for path in sorted((HERE / "results" / "digits" / "mgd").glob("none/*/record.json"))
        if (found := Record.load(path)).status == "valid" and not tracks.departures(found)
    ]
    if not stored:
        pytest.skip("NOT TESTED: no results here; they are in a checkout only")
    folder, found = min(stored, key=lambda pair: pair[1].created)
    claim = found.model_copy(update={"attack": "theirs"})
    inflated = [
        victim.model_copy(update={"poisoned": [round(score - 2, 6) for score in victim.poisoned]})
        for victim in claim.victims
    ]
    for name, victims, expected in (("true", claim.victims, 0), ("more", inflated, 3)):
        run = tmp_path / name
        claim.model_copy(update={"victims": victims}).save(run / "record.json")
        PoisonSet.load(folder / "poison.safetensors").save(run / "poison.safetensors")
        assert command("submit", name, "--author", "Ada Lovelace", "--out", f"{name}.zip")[0] == 0
        code, out, err = command("verify", f"{name}.zip", "--results", f"results-{name}")
        assert code == expected, out + err
        print(out)
