"""Benchmarks: where they come from, how answers are judged and counted, what an evaluation leaves."""
