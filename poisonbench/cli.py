"""The verbs of the command line.

JAX takes seconds to import, so nothing here imports it before a verb needs it: `--help` answers at
once. Results go to standard output, progress and remarks to standard error. Bad input is one line
and exit code 2.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.exceptions import TyperException

from poisonbench import _entering, _metatraining, _publishing
from poisonbench._options import (
    AttackOption,
    DataDirOption,
    DatasetOption,
    DefenseOption,
    DefenseSetOption,
    FractionOption,
    FreshOption,
    JsonOption,
    LabelsOption,
    ModeOption,
    OutOption,
    RadiusOption,
    ResolutionOption,
    SeedOption,
    SeedsOption,
    SetOption,
    SplitSeedOption,
    TestSizeOption,
    TrackOption,
    TrainSizeOption,
    ValSizeOption,
)
from poisonbench._options import command as _command
from poisonbench.errors import UserError, plain
from poisonbench.smoothness.probe import Images, Probe
from poisonbench.submission import verbs
from poisonbench.velodrome.verbs import optimizers

app = typer.Typer(
    name="poisonbench",
    help="How much test accuracy can an attacker take by changing a small part of a training set?",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(cls=_entering.WithAttack, context_settings=EXTRA)
def run(
    context: typer.Context,
    attack: AttackOption = "mgd",
    track: TrackOption = None,
    dataset: DatasetOption = None,
    data_dir: DataDirOption = None,
    train_size: TrainSizeOption = None,
    val_size: ValSizeOption = None,
    test_size: TestSizeOption = None,
    resolution: ResolutionOption = None,
    split_seed: SplitSeedOption = None,
    fraction: FractionOption = None,
    labels: LabelsOption = None,
    radius: RadiusOption = None,
    mode: ModeOption = None,
    set_: SetOption = None,
    defense: DefenseOption = None,
    defense_set: DefenseSetOption = None,
    seed: SeedOption = 0,
    seeds: SeedsOption = None,
    out: OutOption = Path("runs"),
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Craft a poison, retrain victims on it, and say how much accuracy they lost.

    Options not listed here are the attack's own, e.g. `--attack mgd --steps 100`; with the attack
    named, as in `run --attack mgd --help`, they are listed too.
    """
    from poisonbench import runs

    request = _request(locals())
    finished = runs.run(request, out, fresh=fresh)
    _show(finished, as_json)


@app.command(cls=_entering.WithAttack, context_settings=EXTRA)
def craft(
    context: typer.Context,
    attack: AttackOption = "mgd",
    track: TrackOption = None,
    dataset: DatasetOption = None,
    data_dir: DataDirOption = None,
    train_size: TrainSizeOption = None,
    val_size: ValSizeOption = None,
    test_size: TestSizeOption = None,
    resolution: ResolutionOption = None,
    split_seed: SplitSeedOption = None,
    fraction: FractionOption = None,
    labels: LabelsOption = None,
    radius: RadiusOption = None,
    mode: ModeOption = None,
    set_: SetOption = None,
    seed: SeedOption = 0,
    out: OutOption = Path("runs"),
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Craft a poison file only; prints its path."""
    from poisonbench import runs

    request = _request({**locals(), "seeds": None})
    crafted = runs.craft(request, out, fresh=fresh)
    if as_json:
        print(json.dumps({"poison": str(crafted.path), "hash": crafted.poison.hash}))
    else:
        print(crafted.path)


@app.command()
def evaluate(
    poison: Annotated[
        Path, typer.Argument(help="Poison file to score, or the folder of a run, e.g. a published one.")
    ],
    track: TrackOption = None,
    dataset: DatasetOption = None,
    data_dir: DataDirOption = None,
    train_size: TrainSizeOption = None,
    val_size: ValSizeOption = None,
    test_size: TestSizeOption = None,
    resolution: ResolutionOption = None,
    split_seed: SplitSeedOption = None,
    set_: SetOption = None,
    defense: DefenseOption = None,
    defense_set: DefenseSetOption = None,
    seeds: SeedsOption = None,
    name: Annotated[
        str | None,
        typer.Option(help="Whose poison it is. [default: the run's attack, the file's name]"),
    ] = None,
    out: OutOption = Path("runs"),
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Retrain victims on a poison that is there, and say how much accuracy they lost.

    A run's folder tells whose poison it is, and of what data unless you name a track or data set:
    `--defense` meets published attacks, and crafts nothing.
    """
    given = locals()
    from poisonbench import runs

    if track is None and dataset is None:
        given |= {name: told for name, told in runs.data_of(poison).items() if given[name] is None}
    setting = _setting(given)
    finished = runs.evaluate(poison, setting, name, _command(), out, fresh=fresh)
    _show(finished, as_json)


@app.command()
def transfer(
    folder: Annotated[
        Path, typer.Argument(help="A finished run, e.g. runs/digits/mgd-…, or a published one.")
    ],
    data_dir: DataDirOption = None,
    out: OutOption = Path("runs"),
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Retrain other victims on a run's poison: wider, narrower, a plain network, other optimizers.

    Writes `transfer.json` beside the record; the leaderboard shows what it says.
    """
    from poisonbench import report
    from poisonbench import transfer as transfers

    measured = transfers.measure(folder, data_dir, out, _command(), fresh=fresh)
    if as_json:
        print(measured.model_dump_json(indent=1))
    else:
        report.show_victims(measured.victims, f"{folder.name}: victims of other kinds")
        print(folder / transfers.FILE)


@app.command()
def select(
    keep: Annotated[float, typer.Option(help="Share of the training set to keep.")] = 0.8,
    steps: Annotated[int, typer.Option(min=1, help="Metasteps.")] = 10,
    track: TrackOption = None,
    dataset: DatasetOption = None,
    data_dir: DataDirOption = None,
    train_size: TrainSizeOption = None,
    val_size: ValSizeOption = None,
    test_size: TestSizeOption = None,
    resolution: ResolutionOption = None,
    split_seed: SplitSeedOption = None,
    set_: SetOption = None,
    seed: SeedOption = 0,
    seeds: SeedsOption = None,
    out: OutOption = Path("runs"),
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Select training images by metagradients, and say what that is worth over a random selection.

    Weights are learnt for one half of the validation images and measured on the other.
    """
    from poisonbench import selection

    request = selection.Request(_setting(locals()), keep, steps, seed, _command())
    selected, folder = selection.run(request, out, fresh=fresh)
    if as_json:
        print(selected.model_dump_json(indent=1))
    else:
        selection.show(selected, folder)


@app.command()
def smoothness(
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            help="Recipe of the track or of its transfer victims. Repeatable. [default: the track's own]"
        ),
    ] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="Also survey one change at a time from the smooth recipe.")
    ] = False,
    landscape: Annotated[
        bool, typer.Option("--landscape", help="Also draw the loss over two perturbation directions.")
    ] = False,
    track: TrackOption = None,
    dataset: DatasetOption = None,
    data_dir: DataDirOption = None,
    train_size: TrainSizeOption = None,
    val_size: ValSizeOption = None,
    test_size: TestSizeOption = None,
    resolution: ResolutionOption = None,
    split_seed: SplitSeedOption = None,
    fraction: FractionOption = None,
    radius: RadiusOption = None,
    set_: SetOption = None,
    seeds: Annotated[int, typer.Option(help="Victims, at least 3.")] = Probe.seeds,
    directions: Annotated[int, typer.Option(help="Random directions, at least 2.")] = Probe.directions,
    h: Annotated[
        float, typer.Option("--h", help="Step along a direction, in pixel units, at most 0.25.")
    ] = Probe.h,
    images: Annotated[
        Images, typer.Option(help="Images that steps are taken on: most influential, or random.")
    ] = Probe.images,
    step_size: Annotated[
        list[float] | None,
        typer.Option(help="Size of a sign step, in pixel units. Repeatable. [default: 0.01 to 1]"),
    ] = None,
    points: Annotated[int, typer.Option(help="Points along a landscape's side.")] = Probe.points,
    extent: Annotated[
        float, typer.Option(help="Length of that side, in pixel units, at most 0.25.")
    ] = Probe.extent,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of victims, images and directions.")
    ] = Probe.seed,
    out: OutOption = Path("runs"),
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say, before an attack, whether a recipe's metagradients will be of any use.

    Measures how smoothly training answers to its pixels, whether seeds agree on the metagradient,
    what one step along it gains on them, and clean accuracy; on validation data, never on test.
    """
    from poisonbench.smoothness import experiment, report, tables

    sizes = Probe.step_sizes if step_size is None else tuple(step_size)
    probe = Probe(seeds, directions, h, images, sizes, points, extent, seed)
    setting = _setting({**locals(), "labels": None, "seeds": None})
    request = experiment.Request(setting, tuple(recipe or ()), probe, grid, landscape, _command())
    finished = experiment.run(request, out, fresh=fresh)
    if as_json:
        summary = {"summary": tables.summary(finished.record), "gains": tables.gains(finished.record)}
        stored = finished.record.model_dump(mode="json")
        print(json.dumps({"folder": str(finished.folder), **summary, "record": stored}, indent=1))
    else:
        report.show(finished.record, finished.folder)


app.command()(_metatraining.metatrain)
app.command()(_entering.show)
app.command()(_entering.new)
app.command(context_settings={"ignore_unknown_options": True})(_entering.check)


@app.command("list")
def list_(as_json: JsonOption = False) -> None:
    """Attacks, defences, data sets and tracks, with a line each."""
    from poisonbench import attacks, defenses
    from poisonbench.data import DATASETS
    from poisonbench.tracks import TRACKS

    known = {
        "attacks": {name: attacks.summary(name) for name in attacks.names()},
        "defenses": {name: defenses.summary(name) for name in defenses.names()},
        "datasets": DATASETS,
        "tracks": {name: track.summary for name, track in TRACKS.items()},
    }
    if as_json:
        print(json.dumps(known, indent=1))
        return
    width = max(len(name) for group in known.values() for name in group) + 2
    for kind, group in known.items():
        print(kind)
        for name, summary in group.items():
            print(f"  {name:{width}}{summary}")


for verb in (
    _publishing.publish, _publishing.leaderboard, verbs.submit, verbs.verify, verbs.dispute, optimizers,
):  # fmt: skip
    app.command()(verb)


def _request(given: dict[str, Any]) -> Any:
    from poisonbench import attacks, runs

    setting = _setting(given)
    context: typer.Context = given["context"]
    name: str = given["attack"]
    preset = setting.track.options(name, setting.budget.labels)
    options = dict(preset) | dict(_entering.pairs(context.args))
    own = [option for parameter in context.command.params for option in parameter.opts]
    attack = attacks.build(name, list(options.items()), also_known=own)
    return runs.Request(setting, name, attack, given["seed"], _command())


def _setting(given: dict[str, Any]) -> Any:
    from poisonbench import setting

    return setting.resolve(
        track=given["track"],
        dataset=given["dataset"],
        data_dir=given["data_dir"],
        sizes={
            name: given[name]
            for name in ("train_size", "val_size", "test_size", "resolution", "split_seed")
        },
        fraction=given.get("fraction"),
        labels=given.get("labels"),
        radius=given.get("radius"),
        mode=given.get("mode"),
        overrides=given["set_"] or [],
        seeds=given.get("seeds"),
        defense=given.get("defense"),
        defense_options=given.get("defense_set") or [],
    )


def _show(finished: Any, as_json: bool) -> None:
    if as_json:
        print(finished.record.model_dump_json(indent=1))
        return
    from poisonbench import report

    report.show(finished.record, finished.folder)


def main() -> NoReturn:
    """Run the command line; bad input is one line on standard error and exit code 2."""
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        # Outside standalone mode the parser returns the code of `typer.Exit` instead of raising it.
        result = app(standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except (UserError, TyperException) as error:
        text = error.format_message() if isinstance(error, TyperException) else str(error)
        print(f"error: {plain(text)}", file=sys.stderr)
        code = 2
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)):
            raise
        print(
            "error: out of memory: lower mgd's --memory, take a machine with more, or have smaller"
            " victims or less data, as by --set width=… or --train-size",
            file=sys.stderr,
        )
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:  # which the parser also makes of a KeyboardInterrupt itself
        print("interrupted; the same command goes on from what it had kept", file=sys.stderr)
    sys.exit(code)
