"""The page on learned optimizers: its example runs, its commands exist, its figures are recorded.

The weights that it describes are those that come with the package.
"""

from __future__ import annotations

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from commandline import Run
from docpages import DOCS, commands

from poisonbench.metatraining.experiment import MetaTraining
from poisonbench.optimizers.weights import digest, load_weights, packaged

PAGE = "learned-optimizers.md"


def test_the_example_runs() -> None:
    commands(PAGE)  # skips outside of a checkout
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / PAGE).read_text("utf-8"), re.DOTALL)
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    gradients = jax.tree.map(jnp.ones_like, params)
    names: dict[str, Any] = {"params": params, "gradients": gradients, "loss": 1.0}
    exec(compile(code, PAGE, "exec"), names)
    assert names["params"]["w"].shape == (3, 2)
    assert not jnp.array_equal(names["params"]["w"], params["w"])


def test_the_commands_are_commands(command: Run) -> None:
    """Every verb is there, and has every option that the page names."""
    typed = commands(PAGE)
    assert typed
    said = re.findall(r"`(?:poisonbench )?([a-z]*) ?(--[a-z-]+)", (DOCS / PAGE).read_text("utf-8"))
    verbs = ("metatrain", "optimizers", "run", "smoothness", "transfer")
    known = "".join(command(verb, "--help")[1] for verb in verbs)
    for words in typed:
        assert command(words[0], "--help")[0] == 0
        for option in (word for word in words if word.startswith("--")):
            assert option in command(words[0], "--help")[1]
    for _, option in said:
        assert option in known, option


def rows(page: str, first: str) -> list[list[str]]:
    """Cells of the rows of all tables that begin so, but for rows with an empty cell."""
    found = [line for line in page.splitlines() if line.startswith(f"| {first} | ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in found]
    return [row for row in cells if all(row)]


def test_the_figures_are_those_of_the_records() -> None:
    commands(PAGE)
    page = (DOCS / PAGE).read_text("utf-8")
    for name in ("velo", "mlp_opt"):
        cells, judged = rows(page, f"`{name}`")
        summary = rows((DOCS.parent / "results/optimizers/table.md").read_text("utf-8"), name)[0]
        assert judged[1:] == summary[2:]
        (link,) = re.findall(r"\((.*)\)", cells[2])
        record = MetaTraining.load(DOCS / link / "metatraining.json")
        learnt, packed = load_weights(DOCS / link / "weights.safetensors"), packaged(name)
        assert digest(learnt[1]) == digest(packed[1])
        lengths = record.schedule["min_unroll"], record.schedule["max_unroll"]
        assert cells[3] == f"{lengths[0]} to {lengths[1]} steps"
        ours, adams = (np.mean(scores, 0) for scores in (record.scores, record.adam))
        assert cells[4:6] == [f"{score:.2f}" for score in ours]
        assert cells[6] == ", ".join(f"{score:.2f}" for score in adams)
    tables = (DOCS.parent / "results/README.md").read_text("utf-8")
    drops = [line for line in page.splitlines() if re.search(r"\| (free|fixed) \|", line)]
    assert len(drops) == 7
    for line in drops:
        attack, _, adamw, velo, cnn, mlp_opt = (cell.strip() for cell in line.strip("|").split("|"))
        name = attack.split("`")[1].replace("_", "\\_")
        ends = f"| {adamw} | {cnn} | {velo} | {mlp_opt} |"
        assert any(name in row and row.endswith(ends) for row in tables.splitlines()), line
    stored = DOCS.parent / "benchmarks/results/estimators/estimators.json"
    comparison = json.loads(stored.read_text("utf-8"))
    race = page[page.index("**The race**") : page.index("So: exact")]
    for leg in comparison["race"]:
        rivals = [
            x for x in comparison["race"] if all(x[k] == leg[k] for k in ("num_steps", "estimator"))
        ]
        assert f"{min(x['score'][-1] for x in rivals):.2f}" in race, leg["estimator"]
    assert all(len(line) <= 110 or line.startswith("|") for line in page.splitlines())
