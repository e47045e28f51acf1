"""A policy that pushes a T, trained in an hour without a GPU, and what to do with it."""
