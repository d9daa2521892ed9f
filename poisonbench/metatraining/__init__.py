"""Where learned optimizers are trained: their tasks, and what estimates their gradients."""
