"""Training VQ-BeT in its two stages, and seeing how often it succeeds."""

import os

# Between operations, OpenMP's threads spin for the next one and burn the time of whatever else
# runs on the machine: with two busy cores a training step takes up to four times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
