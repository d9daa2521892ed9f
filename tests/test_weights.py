"""Files of weights.

- both forms come back as they were, at the sizes of the release, and give the same bytes again;
- a released file is Flax msgpack, with or without its frame and its configuration;
- what is packaged is under 2 MB, and a committed record says how it came about;
- nothing is unpickled; whatever is spoilt, of another optimizer or of a variant that is not here is
  refused in one error, and a bucket's path names the command that fetches it.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from safetensors import safe_open
from safetensors.numpy import save

import poisonbench.optimizers
from poisonbench.errors import UserError
from poisonbench.metatraining.experiment import MetaTraining
from poisonbench.optimizers import FAMILIES, MLPOptimizer, VeLO
from poisonbench.optimizers.weights import digest, load_weights, packaged, save_weights
from poisonbench.victim.recipe import LEARNED

SMALL = VeLO(hidden=4, bank=2, bank_scale=1.0)
GIN = """
# the sizes of the release
sample_task_family = "phase_one_distribution"
opt_from_checkpoint__6cf1/HyperV2.lstm_hidden_size = 4
opt_from_checkpoint__6cf1/HyperV2.param_inits = 2
HyperV2.use_bugged_loss_features = False
"""


def arrays(optimizer: Any, seed: int = 0) -> Any:
    """Random weights of a family, as numpy has them."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: np.float32(rng.normal(size=shape)),
        optimizer.shapes(),
        is_leaf=lambda x: isinstance(x, tuple),
    )


def assert_same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


@pytest.mark.parametrize("optimizer", [VeLO(), SMALL, MLPOptimizer(), MLPOptimizer(7)], ids=str)
def test_our_form_comes_back_as_it_was(tmp_path: Path, optimizer: Any) -> None:
    weights = arrays(optimizer)
    save_weights(tmp_path / "a.safetensors", optimizer, weights, {"command": "made up", "a": "b"})
    family, back = load_weights(tmp_path / "a.safetensors")
    assert family == optimizer
    assert_same(back, weights)
    save_weights(tmp_path / "b.safetensors", family, back, {"a": "b", "command": "made up"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_released_form_at_the_sizes_of_the_release(tmp_path: Path) -> None:
    weights = arrays(VeLO())
    assert sum(x.size for x in jax.tree.leaves(weights)) == 2_320_385
    (tmp_path / "params").write_bytes(
        msgpack_serialize({"params": weights, "gen_id": "abcdef", "step": np.int64(7)})
    )
    for path in (tmp_path, tmp_path / "params"):
        family, back = load_weights(path)
        assert family == VeLO()
        assert_same(back, weights)


def test_weights_without_a_frame(tmp_path: Path) -> None:
    weights = arrays(SMALL)
    (tmp_path / "theta.state").write_bytes(msgpack_serialize(weights))
    family, back = load_weights(tmp_path / "theta.state")
    assert family == VeLO(4, 2)
    assert_same(back, weights)


@pytest.mark.parametrize(
    ("gin", "message"),
    [
        (GIN, None),
        (GIN.replace("= 4", "= 512"), "lstm_hidden_size = 512, and here it is 4"),
        (GIN.replace("inits = 2", "inits = 256"), "param_inits = 256"),
        (GIN.replace("False", "True"), "use_bugged_loss_features = True"),
        # Where it says nothing the library's default holds, which is another variant.
        ("\n".join(GIN.splitlines()[:-1]), "use_bugged_loss_features = True"),
        (GIN + "HyperV2.use_bugged_next_lstm_state = True\n", "use_bugged_next_lstm_state = True"),
        ("AdafacMLPLOpt.hidden_size = 4", "another optimizer's weights"),
    ],
)
def test_a_configuration_is_held_against_what_is_here(
    tmp_path: Path, gin: str, message: str | None
) -> None:
    frame = {"params": arrays(SMALL), "gen_id": "", "step": 0}
    (tmp_path / "params").write_bytes(msgpack_serialize(frame))
    (tmp_path / "config.gin").write_text(gin)
    if message is None:
        assert load_weights(tmp_path)[0] == VeLO(4, 2)
        return
    with pytest.raises(UserError, match=message):
        load_weights(tmp_path)


class Trap:
    """Says so if it is ever unpickled."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("unpickled",))


def spoilt() -> dict[str, tuple[bytes, str]]:
    """Files that are refused, and why."""
    weights = arrays(SMALL)
    header = '{"format": 1, "optimizer": "velo", "sizes": {"hidden": 4, "bank": 2, "bank_scale": 1.0}}'
    other = header.replace("velo", "sgd")
    lone = {"a": np.zeros(2, np.float32)}
    released = msgpack_serialize(weights)
    wrong = {**weights, "lstm_init_state": {"hidden": np.full((1, 4), np.nan, np.float32)}}
    wrong["lstm_init_state"]["cell"] = np.zeros((1, 4), np.float32)
    return {
        "empty": (b"", "neither safetensors nor Flax msgpack"),
        "text": (b"just a text, no weights", "no weights of velo|neither"),
        "pickle": (pickle.dumps(Trap()), "neither|no weights"),
        "pickle in msgpack": (msgpack_serialize({"params": pickle.dumps(Trap())}), "no weights of velo"),
        "cut": (released[: len(released) // 2], "neither"),
        "older": (msgpack_serialize({"0": weights, "1": "", "2": 0}), "older VeLO"),
        "not finite": (msgpack_serialize(wrong), "finite throughout"),
        "double": (
            msgpack_serialize(jax.tree.map(lambda x: x.astype(np.float64), weights)),
            "must be float32",
        ),
        "sizes": (
            msgpack_serialize({**weights, "lstm_init_state": {"hidden": 1}}),
            "cell at lstm_init_state",
        ),
        "no header": (save(lone), "no file of optimizer weights"),
        "other optimizer": (save(lone, {"poisonbench": other}), "no learned optimizer called 'sgd'"),
        "other arrays": (
            save(lone, {"poisonbench": header}),
            "at the top is",
        ),
        "other format": (save(lone, {"poisonbench": header.replace("1,", "9,", 1)}), "format 9"),
        "other sizes": (
            save(lone, {"poisonbench": header.replace('"bank"', '"bunk"')}),
            "no file of optimizer weights",
        ),
        "header no object": (save(lone, {"poisonbench": "[]"}), "no file of optimizer weights"),
    }


@pytest.mark.parametrize("name", spoilt())
def test_what_is_spoilt_is_refused(tmp_path: Path, name: str) -> None:
    content, message = spoilt()[name]
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_weights(tmp_path / "file")


def test_where_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read weights from"):
        load_weights(tmp_path / "nothing")
    with pytest.raises(UserError, match="params: No such file"):
        load_weights(tmp_path)


def test_a_bucket_names_the_command_that_fetches_it() -> None:
    with pytest.raises(UserError, match=r"gsutil cp 'gs://bucket/name/\*' FOLDER"):
        load_weights("gs://bucket/name/params")


def test_weights_of_another_family_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="weights of velo"):
        save_weights(tmp_path / "a", SMALL, arrays(MLPOptimizer()), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.wheel
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_packaged_can_be_read(name: str) -> None:
    optimizer, weights = packaged(name)
    assert optimizer.name == name
    assert FAMILIES[name].of(weights).shapes() == optimizer.shapes()


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_packaged_is_small_and_has_its_record(name: str) -> None:
    file = Path(poisonbench.optimizers.__file__).with_name(f"{name}.safetensors")
    folder = Path(__file__).parents[1] / "results" / "metatraining" / f"{name}-windows"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: records are in a checkout only")
    record = MetaTraining.load(folder / "metatraining.json")
    with safe_open(file, framework="numpy") as opened:
        header = json.loads(opened.metadata()["poisonbench"])
    assert file.read_bytes() == (folder / "weights.safetensors").read_bytes()
    assert digest(packaged(name)[1])[:12] == LEARNED[name]
    assert file.stat().st_size < 2_000_000
    assert header["about"]["command"] == record.command
    assert header["sizes"] | {"name": name} == record.optimizer
    assert record.code["dirty"] is False


def test_names_of_what_is_packaged() -> None:
    with pytest.raises(UserError, match="no learned optimizer called 'vello'; did you mean velo"):
        packaged("vello")
