"""Benchmarks: ``python -m bench layer`` (see ``python -m bench``); results stand in bench/results."""
