"""What rows are called: an attack or a defence, with the options that tell it from its neighbours."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from poisonbench.records import Record

LATER = {
    "against": "",
    "differentiated": 1.0,
    "full_from": 1.0,
    "judged_on": "validation",
    "label_step": 0.0,
    "last_step": 0.1,
    "memory": "2GiB",
    "restarts": 0,
    "temperature": 1.0,
}
"""Options that attacks were given later, with the values that they had in effect before, and that a row
does not name."""
UNSAID = {**LATER, "momentum": 0.8, "step_size": 0.1, "update": "adam"}
"""Those, and what else goes without saying: how every ascent steps unless it is told otherwise."""


def telling_options(group: list[Record]) -> dict[str, set[str]]:
    """For every attack in a table, the options that its records do not share."""
    options: dict[str, list[dict[str, Any]]] = {}
    for record in group:
        if crafted(record):
            options.setdefault(record.attack, []).append(_options(record))
    # How a label flip is spread makes two attacks of it, so it is said of a lone one too.
    telling = {attack: {"spread"} if attack == "label_flip" else set[str]() for attack in options}
    for attack, several in options.items():
        if any(each.get("against") for each in several):
            telling[attack].add("against")  # an adaptive attack is never taken for its twin
        for name in set[str]().union(*several):
            if len({canonical(each.get(name, LATER.get(name))) for each in several}) > 1:
                telling[attack].add(name)
    return telling


def _options(record: Record) -> dict[str, Any]:
    return {**record.attack_config, "attack_seed": record.attack_seed}


def crafted(record: Record) -> bool:
    """Whether the poison was made by the named attack here, not handed in under that name."""
    return record.crafting_seconds is not None


def attack_name(record: Record, telling: Iterable[str]) -> str:
    """What a row is called: the attack, with these of its options."""
    if not crafted(record):
        return f"{record.attack} (from a file)"
    told = [
        f"{name}={value if isinstance(value, str) else canonical(value)}"
        for name, value in sorted(_options(record).items())
        if name in telling and not (name in UNSAID and UNSAID[name] == value)
    ]
    return f"{record.attack} ({', '.join(told)})" if told else record.attack


def telling_name(name: str, config: dict[str, Any], others: Iterable[dict[str, Any]]) -> str:
    """A defence, with the options in which records of it differ."""
    flat = [_flattened(each) for each in others]
    mine = _flattened(config)
    told = [
        f"{option}={value if isinstance(value, str) else canonical(value)}"
        for option, value in sorted(mine.items())
        if len({canonical(each[option]) for each in flat if option in each}) > 1
    ]
    return f"{name} ({', '.join(told)})" if told else name


def _flattened(config: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{part}.{option}" if len(config) > 1 else option: value
        for part, options in config.items()
        for option, value in options.items()
    }


def canonical(value: object) -> str:
    """JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
