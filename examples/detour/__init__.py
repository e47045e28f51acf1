"""The demo: a robot that must pass a bar on one side or the other, and may not average the two."""
