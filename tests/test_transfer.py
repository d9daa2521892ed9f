"""What a poison does to victims that it was not crafted against.

Claims of `poisonbench.transfer` and of a track's transfer victims tested here:

- they are a wider and a narrower network, three other optimizers (two of them learnt) and another kind
  of network, every one of which learns;
- scores are paired, on the run's own evaluation seeds, and lie beside its record; asked for again they
  are read, not measured;
- another poison than the record's, and other data, are refused;
- a published run takes them along, and the results page shows them.

Runs are tiny: 100 digits, a ResNet-9 of width 2, one epoch, two seeds.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from poisonbench import attacks, harness, runs, setting, transfer
from poisonbench.data import DataSpec, load
from poisonbench.errors import UserError
from poisonbench.runs import Finished, Request
from poisonbench.tracks import DIGITS, TRACKS, Track
from poisonbench.victim.evaluation import train_and_score
from poisonbench.victim.recipe import LEARNED
from poisonbench.victim.training import TrainingSet

tables: Any = importlib.import_module("poisonbench.leaderboard.tables")


VICTIMS = dict(DIGITS.transfer)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transfer victims as small as the run's own."""
    small = {name: r.replace(width=2, epochs=1, batch_size=50) for name, r in DIGITS.transfer.items()}
    # It does more for each tensor, and takes longer to compile.
    small["velo"] = small["velo"].replace(network="cnn")
    monkeypatch.setattr(Track, "transfer", property(lambda _: small))


@pytest.fixture
def finished(tmp_path: Path) -> Finished:
    sizes = {"train_size": 100, "val_size": 50, "test_size": 50}
    chosen = setting.resolve(
        track=None, dataset=None, data_dir=None, sizes=sizes, fraction=0.1, labels="free",
        radius=None, overrides=["network=cnn", "width=2", "epochs=1", "batch_size=50"], seeds=2,
    )  # fmt: skip
    attack = attacks.build("label_flip", [])
    return runs.run(Request(chosen, "label_flip", attack, 0, "poisonbench run"), tmp_path / "runs")


def test_learned_victims_differ_from_another_by_the_optimizer_alone() -> None:
    smooth = DIGITS.recipes["smooth"]
    assert (VICTIMS["wide"].width, VICTIMS["narrow"].width) == (2 * smooth.width, smooth.width // 2)
    assert all(VICTIMS[name].replace(width=smooth.width) == smooth for name in ("wide", "narrow"))
    assert (VICTIMS["adamw"].optimizer, VICTIMS["cnn"].network) == ("adamw", "cnn")
    for name, like in (("velo", DIGITS.recipes["smooth"]), ("mlp_opt", VICTIMS["cnn"])):
        ours = VICTIMS[name]
        assert ours.optimizer == name
        assert dict(ours.optimizer_options) == {"weights": LEARNED[name]}
        assert ours.weight_decay == 0
        same = {n: getattr(like, n) for n in ("optimizer", "optimizer_options", "weight_decay")}
        assert ours.replace(**same) == like


@pytest.mark.slow
def test_scores_lie_beside_the_record(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = transfer.measure(finished.folder, None, tmp_path / "runs", "poisonbench transfer")
    names = ["wide", "narrow", "adamw", "cnn", "velo", "mlp_opt"]
    assert [v.recipe_name for v in measured.victims] == names
    assert all(v.seeds == finished.record.victims[0].seeds for v in measured.victims)
    assert measured.poison_hash == finished.record.poison_hash
    stored = json.loads((finished.folder / transfer.FILE).read_text())
    assert stored == measured.model_dump(mode="json")

    monkeypatch.setattr(harness, "evaluate", lambda *_, **__: pytest.fail("measured again"))
    assert transfer.measure(finished.folder, None, tmp_path / "runs", "again") == measured

    stale = measured.model_copy(update={"poison_hash": "0" * 64})
    stale.save(finished.folder / transfer.FILE)
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        transfer.measure(finished.folder, None, tmp_path / "runs", "again")
    measured.save(finished.folder / transfer.FILE)
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        transfer.measure(finished.folder, None, tmp_path / "runs", "again", fresh=True)

    target = runs.publish(finished.folder, tmp_path / "results")
    assert (target / transfer.FILE).is_file()
    page = tables.build(tmp_path / "results")[Path("README.md")]
    (header,) = [line for line in page.splitlines() if line.startswith("| attack | wide")]
    assert header == "| attack | wide | narrow | adamw | cnn | velo | mlp\\_opt |"
    assert str(measured.victims[3].drop) in page


def test_other_poison_and_other_data_are_refused(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = load(DataSpec(name="digits", train_size=90, val_size=50, test_size=50))
    with monkeypatch.context() as patched:
        patched.setattr("poisonbench.data.load", lambda *_: other)
        with pytest.raises(UserError, match="data are not those"):
            transfer.measure(finished.folder, None, tmp_path, "")
    finished.record.model_copy(update={"defense": "mixup"}).save(finished.folder / "record.json")
    with pytest.raises(UserError, match="under mixup, and transfer is measured on undefended ones"):
        transfer.measure(finished.folder, None, tmp_path, "")
    changed = finished.record.model_copy(update={"poison_hash": "0" * 64})
    changed.save(finished.folder / "record.json")
    with pytest.raises(UserError, match="another poison"):
        transfer.measure(finished.folder, None, tmp_path, "")
    assert not (finished.folder / transfer.FILE).exists()
    with pytest.raises(UserError, match="cannot read"):
        transfer.measure(tmp_path / "nowhere", None, tmp_path, "")


@pytest.mark.slow
def test_every_victim_differs_and_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for track in TRACKS.values():
        recipes = {**track.recipes, **track.transfer}
        assert len(set(recipes.values())) == len(recipes) == 8
    digits = load(DataSpec(name="digits", train_size=500, val_size=100, test_size=200))
    data = TrainingSet.clean(digits.train_images, digits.train_labels, 10)
    keys = jax.random.split(jax.random.key(0), 1)
    for name, recipe in DIGITS.transfer.items():
        narrow = recipe.network == "resnet9"  # where width is what takes the time
        quick = recipe.replace(width=min(recipe.width, 8)) if narrow else recipe
        accuracy = train_and_score(quick, data, keys, digits.test_images, digits.test_labels)[0, -1]
        assert accuracy > 90, name
        assert np.isfinite(accuracy)
