"""From somebody's run to an entry: bundles, and the maintainer's side, which trusts nothing of them."""
