"""The parts of `bench_trainer.py`: what is measured, and the two sides that are measured."""
