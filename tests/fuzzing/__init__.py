"""The parts of tests/fuzz_arguments.py."""
