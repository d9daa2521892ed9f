"""Data are selected on one half of the validation images and judged on the other.

Claims of `poisonbench.selection` tested here:

- as many images are kept as asked for, those of the largest weights, and victims train on them, on
  everything and on as many random ones, seed by seed;
- the half that judges makes no difference to what is selected;
- the same request reads what is there, `fresh` measures again, with the same selection, and so do
  other victims;
- killed, it learns no weights and trains no victims again that it has;
- mislabelled images are left out more often than chance has it;
- a share outside (0, 1) and a selection smaller than a batch are refused, and nothing is written.

Runs are tiny: 100 digits, a plain network of width 2, two epochs, two seeds.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import PRNGKeyArray

from poisonbench import harness, selection, setting
from poisonbench.data import Dataset, load
from poisonbench.defenses import metagradient_weights
from poisonbench.errors import UserError
from poisonbench.selection import Request, Selection
from poisonbench.statistics import paired_drop


def request(
    keep: float = 0.6, steps: int = 2, width: int = 2, epochs: int = 2, network: str = "cnn"
) -> Request:
    tiny = setting.resolve(
        track=None, dataset=None, data_dir=None,
        sizes={"train_size": 100, "val_size": 60, "test_size": 50}, fraction=None, labels=None,
        radius=None, seeds=2,
        overrides=[f"network={network}", f"width={width}", f"epochs={epochs}", "batch_size=25"],
    )  # fmt: skip
    return Request(tiny, keep, steps, 0, "poisonbench select")


@pytest.fixture(scope="module")
def selected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Selection, Path]:
    return selection.run(request(), tmp_path_factory.mktemp("selected"))


def test_what_is_kept_and_measured(selected: tuple[Selection, Path]) -> None:
    found, folder = selected
    assert len(found.kept) == len(set(found.kept)) == 60
    assert found.kept == sorted(found.kept)
    assert [len(s) for s in (found.whole, found.selected, found.random)] == [2, 2, 2]
    assert found.gain == paired_drop(found.selected, found.random)
    assert Selection.load(folder / selection.FILE) == found
    assert (folder / "kept.txt").read_text().split() == [str(index) for index in found.kept]
    assert found.seeds == [0, 1]


def test_it_is_read_where_it_is_and_measured_again_where_asked(
    selected: tuple[Selection, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, folder = selected
    again, _ = selection.run(request(), folder.parents[1], fresh=True)
    assert again.model_copy(update={"created": found.created}) == found
    with monkeypatch.context() as patched:
        patched.setattr("poisonbench.harness.crafting_key", lambda _: pytest.fail("selected again"))
        assert selection.run(request(), folder.parents[1])[0] == again
    other, elsewhere = selection.run(request(keep=0.5), folder.parents[1])
    assert elsewhere != folder
    assert set(other.kept) <= set(found.kept)
    monkeypatch.setattr("poisonbench.harness.victim_code", lambda: "changed")
    assert selection.run(request(), folder.parents[1])[1] != folder


def test_killed_it_goes_on_where_it_was(
    selected: tuple[Selection, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = selected
    asked: list[int] = []
    key = harness.evaluation_key

    def until(seed: int) -> PRNGKeyArray:
        asked.append(seed)
        if len(asked) in (1, 5):  # before the first victim, and after three of six
            raise KeyboardInterrupt
        return key(seed)

    monkeypatch.setattr(harness, "evaluation_key", until)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            selection.run(request(), tmp_path)
    monkeypatch.setattr(
        metagradient_weights, "weight_metagradient", lambda *_: pytest.fail("learnt again")
    )
    again, folder = selection.run(request(), tmp_path)
    assert again.model_copy(update={"created": found.created}) == found
    assert len(asked) == 1 + 4 + 3
    assert sorted(path.name for path in folder.iterdir()) == ["kept.txt", "selection.json"]


def test_measured_afresh_and_killed_it_goes_on_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, folder = selection.run(request(), tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(harness, "evaluation_key", interrupted)
        with pytest.raises(KeyboardInterrupt):
            selection.run(request(), tmp_path, fresh=True)
    assert not (folder / selection.FILE).exists()
    monkeypatch.setattr(metagradient_weights, "weight_metagradient", lambda *_: pytest.fail("again"))
    again, _ = selection.run(request(), tmp_path)
    assert again.model_copy(update={"created": first.created}) == first


def interrupted(seed: int) -> PRNGKeyArray:
    raise KeyboardInterrupt


def changed(monkeypatch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    monkeypatch.setattr("poisonbench.data.load", lambda *_: dataset)


def test_the_judging_half_decides_nothing(
    selected: tuple[Selection, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = load(request().setting.dataset)
    images, labels = dataset.val_images.copy(), dataset.val_labels.copy()
    images[30:], labels[30:] = 255, 0
    changed(monkeypatch, replace(dataset, val_images=images, val_labels=labels))
    assert selection.run(request(), tmp_path)[0].kept == selected[0].kept


@pytest.mark.slow
def test_mislabelled_images_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(keep=0.7, steps=16, width=4, epochs=8, network="resnet9")
    dataset = load(asked.setting.dataset)
    wrong = np.arange(0, 100, 5)
    labels = dataset.train_labels.copy()
    labels[wrong] = (labels[wrong] + 5) % 10
    changed(monkeypatch, replace(dataset, train_labels=labels))
    kept = selection.run(asked, tmp_path)[0].kept
    assert np.isin(wrong, kept).mean() < 0.5, "chance keeps 0.7 of them"


@pytest.mark.parametrize("keep", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_outside_its_range_is_refused(keep: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--keep must lie strictly between 0 and 1"):
        selection.run(request(keep), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_selection_smaller_than_a_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch_size 25 is larger"):
        selection.run(request(0.1), tmp_path)
    assert not list(tmp_path.iterdir())
