"""Rainbow (Hessel et al., 2018): C51 with double selection, dueling streams and noisy layers, on a prioritised replay.

Its sixth part is `n_step` of the configuration, 3 in its presets. The divergence of the loss is the priority; noise
explores, so that epsilon is small or 0.
"""

import dataclasses

from jaxdqn.agents import c51
from jaxdqn.agents.categorical import Settings


@dataclasses.dataclass(frozen=True)
class RainbowSettings(Settings):
    """Of the head, and of the target."""

    double: bool = True
    """The online network selects the action that the target network values (van Hasselt et al., 2016)."""


RAINBOW = c51.C51._replace(always=("dueling", "noisy"), replay="prioritised", settings=RainbowSettings)
