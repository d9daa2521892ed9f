"""poisonbench: how much test accuracy an attacker takes by changing a small part of a training set."""

__version__ = "0.1.0"
