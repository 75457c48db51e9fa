"""What eager PyTorch on a CPU takes from C code, compiled where it runs."""
