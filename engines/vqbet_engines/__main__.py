"""`python -m vqbet_engines` is `vqbet-build`, for callers that know the interpreter only."""

from vqbet_engines.cli import main

main()
