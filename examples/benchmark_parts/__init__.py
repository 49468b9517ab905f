"""What the benchmarks of the methods share: models and prompts, rounds that agree with a repeat, tables."""
