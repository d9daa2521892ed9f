"""A run leaves all of itself in one folder, and is published once.

Claims of `poisonbench.runs` tested here:

- record, poison, tables and pictures lie in the run's folder; beside it only finished victims are
  kept, for every attack of the track to share; nothing is written elsewhere;
- the record holds everything that it promises, and what it says of the poison is what the file holds;
- the same request finds its record and trains nothing; `fresh` does it all again, with the same bytes;
  whatever decides the poison is in the folder's name, and what does not is not;
- a poison file scored alone gives the accuracies of its run; a run's folder tells whose poison it is,
  unless another name is given, and is refused where its record is of another poison;
- publishing copies a finished run, and never overwrites one.

Runs are tiny: 100 digits, a plain network of width 2, one epoch, two seeds.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import poisonbench
from poisonbench import attacks, harness, runs, setting
from poisonbench.data import DataSpec
from poisonbench.errors import UserError
from poisonbench.records import Record
from poisonbench.runs import Finished, Request
from poisonbench.threat import PoisonSet

SIZES = {"train_size": 100, "val_size": 50, "test_size": 50}
RECIPE = ["network=cnn", "width=2", "epochs=1", "batch_size=50"]


def request(
    name: str = "mgd", steps: int = 3, seed: int = 0, seeds: int = 2, labels: str = "fixed"
) -> Request:
    tiny = setting.resolve(
        track=None, dataset=None, data_dir=None, sizes=SIZES, fraction=0.1, labels=labels,
        radius=None, overrides=RECIPE, seeds=seeds,
    )  # fmt: skip
    cheap = {"start": "random", "check-seeds": "2", "check-every": "2", "steps": str(steps)}
    attack = attacks.build(name, list(cheap.items()) if name == "mgd" else [])
    return Request(tiny, name, attack, seed, "poisonbench run …")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return runs.run(request(), tmp_path_factory.mktemp("finished") / "runs")


def test_a_run_leaves_all_of_itself_in_its_folder(finished: Finished) -> None:
    left = files(finished.folder)
    assert set(left) == {
        "record.json", "poison.safetensors", "checkpoint.safetensors", "crafting.json",
        "accuracies.csv", "crafting.csv",
        "accuracy.png", "crafting.png", "poisons.png", "summary.png",
    }  # fmt: skip
    for name, content in left.items():
        if name.endswith(".png"):
            assert content.startswith(b"\x89PNG\r\n\x1a\n")
            assert content.endswith(b"IEND\xaeB`\x82")
    assert re.fullmatch(r"mgd-[0-9a-f]{8}", finished.folder.name)


def test_nothing_is_written_beside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    monkeypatch.chdir(here)
    done = runs.run(request("none"), there)
    assert list(here.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir() if path not in (here, there)] == []
    assert [path.name for path in there.iterdir()] == ["digits"]
    assert {path.name for path in done.folder.parent.iterdir()} == {done.folder.name, "victims"}
    victims = list((done.folder.parent / "victims").iterdir())
    assert len(victims) == 2  # one group for each recipe, since no poison means the same data twice
    assert {path.suffix for path in victims} == {".json"}


def test_the_tables_are_those_of_the_record(finished: Finished) -> None:
    table = pd.read_csv(finished.folder / "accuracies.csv")
    rows = [
        (v.recipe_name, *scores)
        for v in finished.record.victims
        for scores in zip(v.seeds, v.clean, v.poisoned, v.clean_best, v.poisoned_best, strict=True)
    ]
    assert list(table.columns) == ["recipe", "seed", "clean", "poisoned", "clean_best", "poisoned_best"]
    assert [tuple(row) for row in table.itertuples(index=False)] == rows
    crafting = pd.read_csv(finished.folder / "crafting.csv")
    assert crafting["metastep"].tolist() == [0, 1, 2, 3]
    assert crafting["held_out_loss"].notna().tolist() == [True, False, True, True]


def test_the_record_holds_what_it_promises(finished: Finished) -> None:
    stored = json.loads((finished.folder / "record.json").read_text("utf-8"))
    poison = PoisonSet.load(finished.folder / "poison.safetensors")
    assert stored["schema_version"] == 1
    assert (stored["track"], stored["attack"], stored["defense"]) == ("digits", "mgd", "none")
    assert stored["attack_config"] == attacks.config(request().attack)
    assert stored["attack_config"]["steps"] == 3
    assert stored["attack_seed"] == 0
    assert stored["custom"] == list(request().setting.custom) != []
    assert stored["command"] == "poisonbench run …"
    assert stored["poison_hash"] == poison.hash
    assert stored["hashes"]["train"] == poison.train_hash
    assert set(stored["hashes"]) == {"train", "val", "test"}
    assert stored["num_poison"] == len(poison) == 10
    assert stored["num_train"] == 100
    assert stored["budget"] == poison.budget.model_dump()
    assert stored["dataset"]["train_size"] == 100
    for victim in stored["victims"]:
        assert victim["seeds"] == [0, 1]
        assert victim["recipe"] == request().setting.recipes[victim["recipe_name"]].as_dict()
        for scores in ("clean", "poisoned", "clean_best", "poisoned_best"):
            assert [type(score) for score in victim[scores]] == [float, float]
    assert [victim["recipe_name"] for victim in stored["victims"]] == ["smooth", "standard"]
    assert stored["surrogate"] == "smooth"
    assert stored["code"]["version"] == poisonbench.__version__
    assert {"commit", "dirty"} < set(stored["code"])
    assert {"python", "jax", "jaxlib", "flax", "optax", "numpy"} <= set(stored["libraries"])
    assert all(stored["hardware"].values())
    crafting = json.loads((finished.folder / "crafting.json").read_text("utf-8"))
    assert stored["crafting_seconds"] == round(crafting["seconds"], 1)
    trained = (finished.folder.parent / "victims").iterdir()
    seconds = sum(json.loads(path.read_text("utf-8"))["seconds"] for path in trained)
    assert stored["evaluation_seconds"] == round(seconds, 1)
    created = datetime.fromisoformat(stored["created"])
    assert created.utcoffset() == UTC.utcoffset(None)
    assert created <= datetime.now(UTC)


def test_the_same_request_trains_nothing(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object, **options: object) -> Any:
        raise AssertionError("it was done already")

    before = files(finished.folder)
    monkeypatch.setattr(harness, "evaluate", never)
    monkeypatch.setattr(attacks.load("mgd"), "craft", never)
    again = runs.run(request(), finished.folder.parents[1])
    assert again == finished
    crafted = runs.craft(request(), finished.folder.parents[1])
    assert crafted.path == finished.folder / "poison.safetensors"
    assert crafted.seconds > 0
    assert [row["metastep"] for row in crafted.log] == [0, 1, 2, 3]
    assert files(finished.folder) == before


def test_fresh_does_it_again_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crafts, evaluations = [], []
    craft, evaluate = attacks.load("mgd").craft, harness.evaluate

    def counting_craft(self: Any, *arguments: Any) -> PoisonSet:
        crafts.append(self)
        return craft(self, *arguments)

    def counting_evaluate(*arguments: Any, reuse: bool, **words: Any) -> harness.Evaluation:
        evaluations.append(reuse)
        return evaluate(*arguments, reuse=reuse, **words)

    monkeypatch.setattr(attacks.load("mgd"), "craft", counting_craft)
    monkeypatch.setattr(harness, "evaluate", counting_evaluate)
    first = runs.run(request(), tmp_path)
    before = files(first.folder)
    (first.folder / "checkpoint.corrupt-1.safetensors").write_bytes(b"kept")
    (first.folder / "notes.txt").write_bytes(b"the user's own")
    (first.folder / "poison.safetensors").write_bytes(b"spoilt")
    second = runs.run(request(), tmp_path, fresh=True)
    assert len(crafts) == 2
    assert evaluations == [True, False]
    after = files(second.folder)
    assert after.pop("checkpoint.corrupt-1.safetensors") == b"kept"
    assert after.pop("notes.txt") == b"the user's own"
    assert set(after) == set(before)
    assert second.record.victims == first.record.victims
    same = ["poison.safetensors", "accuracies.csv", "crafting.csv", *(n for n in after if "png" in n)]
    assert [name for name in same if after[name] != before[name]] == []


def test_more_seeds_are_measured_on_the_same_poison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "GROUP", 2)
    first = runs.run(request("noise"), tmp_path)
    more = runs.run(request("noise", seeds=4), tmp_path)
    assert more.folder == first.folder
    assert more.record.poison_hash == first.record.poison_hash
    assert [victim.seeds for victim in more.record.victims] == [[0, 1, 2, 3]] * 2

    def stopped(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        runs.run(request("noise", seeds=6), tmp_path)
    assert Record.load(more.folder / "record.json") == more.record


def test_the_folder_is_named_by_the_code_too(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = request()
    dataset = runs.data.load(plain.setting.dataset)
    adaptive = replace(plain, attack=attacks.build("mgd", [("against", "mixup")]))
    before = [one.identity(dataset) for one in (plain, adaptive)]
    changes = {
        "poisonbench.runs._crafting_sources": lambda: "changed",
        "poisonbench.runs._source": lambda _: "changed",
    }
    for what, changed in changes.items():
        with monkeypatch.context() as patched:
            patched.setattr(what, changed)
            assert plain.identity(dataset) != before[0], what
    monkeypatch.setattr("poisonbench.defenses.sources", lambda _: "changed")
    assert plain.identity(dataset) == before[0]
    assert adaptive.identity(dataset) != before[1]


def test_the_folder_is_named_by_what_decides_the_poison() -> None:
    plain = request()
    tiny = plain.setting
    others = [
        request(steps=4),
        request(seed=1),
        request(labels="free"),
        replace(plain, setting=replace(tiny, dataset=tiny.dataset.model_copy(update={"split_seed": 1}))),
        replace(
            plain,
            setting=replace(tiny, recipes={n: r.replace(epochs=2) for n, r in tiny.recipes.items()}),
        ),
    ]
    dataset = runs.data.load(tiny.dataset)
    identities = {one.identity(dataset) for one in (plain, *others)}
    assert len(identities) == 6
    fewer = replace(dataset, train_labels=dataset.train_labels[:-1])
    assert plain.identity(fewer) not in identities
    same = [
        request(seeds=5),
        replace(plain, command="other"),
        replace(plain, setting=replace(tiny, data_dir="x")),
    ]
    assert {other.identity(dataset) for other in same} == {plain.identity(dataset)}


@pytest.mark.parametrize("name", ["poison.safetensors", "record.json"])
def test_a_spoilt_result_is_refused_not_trusted(name: str, tmp_path: Path) -> None:
    done = runs.run(request("noise"), tmp_path)
    (done.folder / name).write_bytes((done.folder / name).read_bytes()[:-40])
    with pytest.raises(UserError, match=re.escape(str(done.folder / name))):
        runs.run(request("noise"), tmp_path)


def test_a_file_scored_alone_gives_what_its_run_gave(finished: Finished, tmp_path: Path) -> None:
    file = finished.folder / "poison.safetensors"
    scored = runs.evaluate(file, request().setting, "theirs", "poisonbench evaluate …", tmp_path)
    assert scored.record.victims == finished.record.victims
    assert scored.record.poison_hash == finished.record.poison_hash
    assert (scored.record.attack, scored.record.crafting_seconds) == ("theirs", None)
    kept = scored.folder / "poison.safetensors"
    assert kept.read_bytes() == file.read_bytes()
    assert re.fullmatch(r"theirs-[0-9a-f]{8}", scored.folder.name)


def test_a_run_s_folder_tells_whose_poison_it_is(finished: Finished, tmp_path: Path) -> None:
    scored = runs.evaluate(finished.folder, request().setting, None, "poisonbench evaluate …", tmp_path)
    for field in ("attack", "attack_config", "attack_seed", "crafting_seconds", "victims"):
        assert getattr(scored.record, field) == getattr(finished.record, field), field
    named = runs.evaluate(finished.folder, request().setting, "theirs", "", tmp_path).record
    assert (named.attack, named.attack_config, named.crafting_seconds) == ("theirs", {}, None)


def test_a_run_s_folder_tells_of_what_data_it_is(finished: Finished, tmp_path: Path) -> None:
    told = runs.data_of(finished.folder)
    assert told.pop("track") == "digits"
    assert told.pop("dataset") == finished.record.dataset.name
    assert DataSpec(name="digits", **told) == finished.record.dataset
    assert runs.data_of(finished.folder / "poison.safetensors") == {}


@pytest.mark.parametrize("first", ["file", "folder"])
def test_what_is_told_of_one_poison_is_not_told_of_another_run_s(
    first: str, finished: Finished, tmp_path: Path
) -> None:
    name = finished.record.attack
    sources: dict[str, tuple[Path, str | None]] = {
        "file": (finished.folder / "poison.safetensors", name), "folder": (finished.folder, None)
    }  # fmt: skip
    told = {}
    for kind in sorted(sources, key=lambda kind: kind != first):
        source, given = sources[kind]
        told[kind] = runs.evaluate(source, request().setting, given, "", tmp_path).record
    assert told["file"].crafting_seconds is None
    assert told["folder"].crafting_seconds == finished.record.crafting_seconds
    assert told["file"].victims == told["folder"].victims


def test_a_folder_whose_record_is_of_another_poison_is_refused(
    finished: Finished, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(finished.folder / "poison.safetensors", folder)
    finished.record.model_copy(update={"poison_hash": "0" * 64}).save(folder / "record.json")
    with pytest.raises(UserError, match="holds another poison than its record scored"):
        runs.evaluate(folder, request().setting, None, "", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        *("", "../up", "a b", "a/b"),
        *(pytest.param(name) for name in ("né", "_x", "x" * 65)),
    ],
)
def test_a_name_that_no_record_may_have_is_refused_at_once(
    name: str, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scored(*arguments: object, **options: object) -> harness.Evaluation:
        return harness.Evaluation(finished.record.victims, 1.0)

    monkeypatch.setattr(harness, "evaluate", scored)
    file = finished.folder / "poison.safetensors"
    with pytest.raises(UserError, match="--name"):
        runs.evaluate(file, request().setting, name, "", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_for_other_data_is_refused_before_anything_is_written(
    finished: Finished, tmp_path: Path
) -> None:
    file = finished.folder / "poison.safetensors"
    tiny = request().setting
    other = replace(tiny, dataset=tiny.dataset.model_copy(update={"split_seed": 1}))
    with pytest.raises(UserError, match="made for another training set"):
        runs.evaluate(file, other, "theirs", "", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_does_not_fit_is_refused_before_anything_is_written(
    finished: Finished, tmp_path: Path
) -> None:
    tiny = request().setting
    large = {name: recipe.replace(batch_size=101) for name, recipe in tiny.recipes.items()}
    with pytest.raises(UserError, match="batch_size"):
        runs.craft(replace(request("noise"), setting=replace(tiny, recipes=large)), tmp_path)
    assert list(tmp_path.iterdir()) == []
    file = finished.folder / "poison.safetensors"
    with pytest.raises(UserError, match="batch_size"):
        runs.evaluate(file, replace(tiny, recipes=large), "theirs", "", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_publishing_copies_once_and_never_overwrites(finished: Finished, tmp_path: Path) -> None:
    target = runs.publish(finished.folder, tmp_path)
    assert target == tmp_path / "digits" / "mgd" / "none" / finished.folder.name
    published = files(target)
    assert set(published) == {
        "record.json", "poison.safetensors", "accuracies.csv", "crafting.csv",
        "accuracy.png", "crafting.png", "poisons.png", "summary.png",
    }  # fmt: skip
    original = files(finished.folder)
    assert all(original[name] == content for name, content in published.items())
    assert Record.load(target / "record.json") == finished.record

    (target / "record.json").write_text("marked")
    with pytest.raises(UserError, match="never overwritten"):
        runs.publish(finished.folder, tmp_path)
    assert (target / "record.json").read_text() == "marked"
    assert len(files(tmp_path)) == len(published)


def test_an_unfinished_run_is_not_published(tmp_path: Path) -> None:
    crafted = runs.craft(request("noise"), tmp_path / "runs")
    with pytest.raises(UserError, match=r"record\.json"):
        runs.publish(crafted.path.parent, tmp_path / "results")
    assert not (tmp_path / "results").exists()
