"""The network in PyTorch and the loader of checkpoints; the robot never imports this."""
