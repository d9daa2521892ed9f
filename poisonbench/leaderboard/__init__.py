"""Where the installed leaderboard lives; in a checkout its modules are in `leaderboard/`."""

from poisonbench import _plugins

_plugins.extend(__path__, "leaderboard")
