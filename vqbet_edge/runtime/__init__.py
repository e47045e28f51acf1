"""The robot's side: NumPy, msgspec, safetensors and one backend, nothing else."""
