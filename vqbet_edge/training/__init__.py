"""Training of VQ-BeT in two stages; needs PyTorch."""
