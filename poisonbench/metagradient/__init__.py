"""Exact gradients through whole training runs; knows nothing of images or poison."""

from poisonbench.metagradient.checks import AdamWithoutEpsRoot as AdamWithoutEpsRoot
from poisonbench.metagradient.checks import NonFiniteError as NonFiniteError
from poisonbench.metagradient.later import Later as Later
from poisonbench.metagradient.planning import Plan as Plan
from poisonbench.metagradient.planning import plan as plan
from poisonbench.metagradient.replay import metagradient as metagradient
from poisonbench.metagradient.resume import OtherRunError as OtherRunError
from poisonbench.metagradient.states import state_bytes as state_bytes
