"""`python -m vqbet_edge.training.evaluation` is `vqbet-eval`."""

from vqbet_edge.training.evaluation.cli import main

main()
