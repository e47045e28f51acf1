"""Training VQ-BeT in its two stages, and seeing how often it succeeds."""
