"""How good an optimizer is on tasks that it was not trained on: a small VeLOdrome."""
