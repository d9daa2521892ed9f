"""`python -m benchmarks.vectors FILE.npz`: our VeLO beside the reference, number by number.

A file of vectors holds random weights, a few gradients and losses, and what the authors' library
made of them at every step: parameters, and everything on the way to them. `tests/vectors/README.md`
says where ours comes from. One row for each quantity: the largest difference over all steps, relative
to the largest value where the quantity has no natural scale, beside the tolerance. Exit code 1 where
one is missed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from poisonbench.optimizers.velo import loss_decays, step, velo

Vectors = dict[str, np.ndarray]
PARAMETERS, STARTS_AT_ZERO = 1e-6, 5e-10
INTERMEDIATE = 1e-4


@dataclass(frozen=True)
class Difference:
    """How far one quantity is off.

    Attributes:
        quantity: its key in the file.
        largest: over steps and entries; infinite where only one side is finite.
        tolerance: what is allowed.
        relative: whether both are shares of the quantity's largest value.
    """

    quantity: str
    largest: float
    tolerance: float
    relative: bool = False


def read(path: Path) -> Vectors:
    """The arrays of a file; nothing in it is executed."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def nested(vectors: Vectors, prefix: str) -> dict[str, Any]:
    """The arrays under a prefix, nested by their paths; parameters stay flat."""
    tree: dict[str, Any] = {}
    for name, array in vectors.items():
        if not name.startswith(f"{prefix}/"):
            continue
        *folders, leaf = name.removeprefix(f"{prefix}/").split("/")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder.replace("rnn~linear", "rnn/linear"), {})
        branch[leaf] = jnp.asarray(array)
    return tree


def differences(vectors: Vectors) -> Iterator[Difference]:
    """Train with the stored gradients and losses, and hold every stored quantity against ours."""
    ours = _trained(vectors)
    for name, array in sorted(vectors.items()):
        if name not in ours:
            continue
        kind = name.split("/")[0]
        if kind == "params":
            zero = not vectors[f"params0/{name.removeprefix('params/')}"].any()
            yield Difference(name, _largest(ours[name], array), STARTS_AT_ZERO if zero else PARAMETERS)
        elif kind in ("lstm_in", "loss_features", "loss_decays"):
            yield Difference(name, _largest(ours[name], array), INTERMEDIATE)
        else:
            size = float(np.abs(array[np.isfinite(array)]).max(initial=0.0)) or 1.0
            yield Difference(name, _largest(ours[name], array) / size, INTERMEDIATE, relative=True)


def _trained(vectors: Vectors) -> Vectors:
    """Every quantity of the file, as we compute it."""
    weights = nested(vectors, "theta")
    names = [str(name) for name in vectors["tensor_order"]]
    params = [jnp.asarray(vectors[f"params0/{name}"]) for name in names]
    count = int(vectors["num_steps"])
    state = velo(count, weights).init(params)
    update = jax.jit(lambda g, s, p, loss: step(count, weights, 100.0, g, s, p, loss))
    series: dict[str, list[Any]] = {"lstm_h": [state.hidden], "lstm_c": [state.cell]}
    for t, loss in enumerate(vectors["losses"]):
        gradients = [jnp.asarray(vectors[f"grads/{name}"][t]) for name in names]
        moves, state, trace = update(gradients, state, params, loss)
        params = jax.tree.map(jnp.add, params, moves)
        now = {
            "lstm_in": trace.lstm_in, "controls": trace.controls, "lr_mult": trace.lr_mult,
            "loss_features": trace.loss_features, "lstm_h": state.hidden, "lstm_c": state.cell,
            "loss_means": state.losses.means, "loss_running_min": state.losses.least,
        }  # fmt: skip
        for i, name in enumerate(names):
            row = "v_diag" if state.moments[i].column is None else "v_row"
            now |= {
                f"params/{name}": params[i], f"mlp_in/{name}": trace.mlp_in[i],
                f"mlp_out/{name}": trace.mlp_out[i], f"m/{name}": state.moments[i].m,
                f"rms/{name}": state.moments[i].v, f"{row}/{name}": state.moments[i].row,
            }  # fmt: skip
            if state.moments[i].column is not None:
                now[f"v_col/{name}"] = state.moments[i].column
        for name, array in now.items():
            series.setdefault(name, []).append(array)
    series["loss_decays"] = list(loss_decays(count))
    return {name: np.stack([np.asarray(x) for x in arrays]) for name, arrays in series.items()}


def _largest(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference; a NaN equals a NaN, and an infinity itself."""
    ours = ours.reshape(theirs.shape)
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    off = np.abs(np.where(same, 0.0, ours.astype(np.float64) - theirs))
    return float(np.where(np.isfinite(off), off, np.inf).max(initial=0.0))


def main(
    file: Annotated[Path, typer.Argument(help="As tests/vectors/velo_small.npz.")],
) -> None:
    """Print how far our VeLO is from the reference on stored vectors."""
    table = Table("quantity", "largest difference", "tolerance", "", title=str(file))
    missed = 0
    for each in differences(read(file)):
        within = each.largest <= each.tolerance
        missed += not within
        unit = " of the largest" if each.relative else ""
        table.add_row(
            each.quantity,
            f"{each.largest:.1e}{unit}",
            f"{each.tolerance:.0e}",
            "" if within else "missed",
        )
    Console(width=100).print(table)
    if missed:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
