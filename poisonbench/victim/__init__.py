"""Victims: recipes, the ResNet-9, and their training as a pure function."""
