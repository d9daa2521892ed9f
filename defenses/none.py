"""Control: no defence; victims train on whatever they are given."""

from __future__ import annotations

from dataclasses import dataclass

from poisonbench.defenses import Defense


@dataclass(frozen=True)
class NoDefense(Defense):
    """Changes nothing."""
