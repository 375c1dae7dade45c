"""The parts of `bench_gateway.py`: what streams, what proxies, what reads."""
