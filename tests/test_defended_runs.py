"""A defended run measures the undefended run's poison, and leaves that run alone.

Claims of `poisonbench.runs` and of the command line tested here:

- the poison is crafted once, whatever defends its victims; what each defence scored lies in a folder of
  its own, named after it, with the defence and its options in the record;
- `fresh` measures the defended victims anew, and touches nothing of the undefended run;
- other options or other code of a defence are another folder;
- what a filter dropped is counted: all of the poison and nothing else for the oracle;
- a certificate of `dpa` is recorded, and not violated;
- what is printed names the defence, and says what a filter dropped;
- a poison file is scored anew where the code of victims is another;
- what cannot work is refused before anything is written, be the poison crafted or read from a file.

Runs are tiny: 100 digits, a plain network of width 2, one epoch, two seeds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poisonbench import attacks, defenses, report, runs, setting
from poisonbench.errors import UserError
from poisonbench.runs import Request


def request(
    defense: str | None = None, *options: str, attack: str = "label_flip", **game: Any
) -> Request:
    chosen = setting.resolve(
        track=None, dataset=None, data_dir=None,
        sizes={"train_size": 100, "val_size": 50, "test_size": 50},
        **{"fraction": 0.1, "labels": "free", "radius": None, **game},
        overrides=["network=cnn", "width=2", "epochs=1", "batch_size=50"], seeds=2, defense=defense,
        defense_options=options,
    )  # fmt: skip
    return Request(chosen, attack, attacks.build(attack, []), 0, "poisonbench run")


@pytest.mark.slow
def test_one_poison_and_a_folder_for_each_defence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = runs.run(request(), tmp_path)
    before = {path: path.read_bytes() for path in bare.folder.iterdir()}
    monkeypatch.setattr("poisonbench.attacks.label_flip.random_flips", lambda *_: pytest.fail("again"))
    guarded = runs.run(request("oracle,mixup", "mixup.alpha=0.5"), tmp_path)
    assert guarded.folder.parent == bare.folder.parent
    assert guarded.folder.name.startswith(f"{bare.folder.name}-oracle+mixup-")
    record = guarded.record
    assert record.poison_hash == bare.record.poison_hash
    assert (record.defense, bare.record.defense) == ("oracle+mixup", "none")
    assert record.defense_config == {"oracle": {}, "mixup": {"alpha": 0.5}}
    assert record.crafting_seconds == bare.record.crafting_seconds
    for victim in record.victims:
        assert victim.filtering is not None
        assert victim.filtering.clean_run == [0, 0]
        assert victim.filtering.poisoned_run == victim.filtering.poison == [10, 10]

    again = runs.run(request("oracle,mixup", "mixup.alpha=0.5"), tmp_path, fresh=True)
    assert again.record.victims == record.victims
    assert {path: path.read_bytes() for path in bare.folder.iterdir()} == before

    other = runs.run(request("oracle,mixup"), tmp_path)
    monkeypatch.setattr(defenses, "sources", lambda _: "changed")
    changed = runs.run(request("oracle,mixup"), tmp_path)
    assert len({guarded.folder, other.folder, changed.folder}) == 3
    target = runs.publish(guarded.folder, tmp_path / "results")
    assert target.parent == tmp_path / "results" / "digits" / "label_flip" / "oracle+mixup"
    assert {path.suffix for path in target.iterdir()} == {".json", ".csv", ".safetensors"}
    assert list(runs.publish(bare.folder, tmp_path / "results").glob("*.png"))


@pytest.mark.slow
def test_a_certificate_is_recorded_and_holds(tmp_path: Path) -> None:
    record = runs.run(request("dpa", "dpa.k=3", fraction=0.01), tmp_path).record
    for victim in record.victims:
        assert victim.certificate is not None
        assert victim.certificate.changes == 2
        assert victim.certificate.violations == 0
        curve = victim.certificate.curve
        assert curve == sorted(curve, reverse=True)
        assert curve[0] == pytest.approx(sum(victim.clean) / 2)


@pytest.mark.parametrize(
    ("words", "game", "message"),
    [
        (["early_stop", "early_stop.trusted=51"], {}, "needs 51 trusted images"),
        (["dp_sgd", "dp_sgd.parts=7"], {}, "50 cannot be cut into 7"),
        (["spectral"], {"fraction": 0.5}, "less than a batch of 50: lower --fraction"),
        (["epic"], {}, r"every 3 epochs, and there are 1: lower --defense-set epic\.every=…"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    words: list[str], game: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        runs.run(request(*words, **game), tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    crafted = runs.run(request(**game), tmp_path / "bare")
    file, asked = crafted.folder / "poison.safetensors", request(*words, **game).setting
    with pytest.raises(UserError, match=message):
        runs.evaluate(file, asked, "theirs", "poisonbench evaluate", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_poison_file_is_scored_anew_by_other_victims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = runs.run(request(), tmp_path).folder / "poison.safetensors"

    def scored() -> Path:
        return runs.evaluate(file, request().setting, "theirs", "evaluate", tmp_path).folder

    first = scored()
    assert scored() == first
    monkeypatch.setattr("poisonbench.harness.victim_code", lambda: "changed")
    assert scored() != first


@pytest.mark.slow
def test_what_is_printed_names_the_defence_and_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = runs.run(request("spectral"), tmp_path)
    report.show(done.record, done.folder)
    printed = " ".join(capsys.readouterr().out.split())
    assert "label_flip under spectral on digits" in printed
    found = float(np.mean(done.record.victims[0].filtering.poison))
    dropped = float(np.mean(done.record.victims[0].filtering.poisoned_run))
    assert f"smooth: {dropped:.1f} images dropped, among them {found:.1f} of 10 poisoned" in printed
    bare = runs.run(request(), tmp_path)
    report.show(bare.record, bare.folder)
    assert "dropped" not in capsys.readouterr().out
