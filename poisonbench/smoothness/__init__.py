"""Whether a recipe's metagradients will be of any use, measured before an attack."""
