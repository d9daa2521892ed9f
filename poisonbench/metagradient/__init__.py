"""Exact gradients through whole training runs; knows nothing of images or poison."""

from poisonbench.metagradient.replay import metagradient as metagradient
from poisonbench.metagradient.schedule import Plan as Plan
from poisonbench.metagradient.schedule import fitting as fitting
from poisonbench.metagradient.schedule import plan as plan
