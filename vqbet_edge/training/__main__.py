"""`accelerate launch -m vqbet_edge.training` is `vqbet-train` on several processes."""

from vqbet_edge.training.cli import main

main()
