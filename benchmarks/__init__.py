"""Our metagradient engine and its peers, side by side; part of the checkout, not of the wheel."""
