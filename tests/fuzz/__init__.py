"""Fuzzers: `harnesses` has one for each parser, `live` one for connections to a running daemon.

`make fuzz` runs them with atheris, which looks for new paths through the code. The tests run each harness on its corpus
and on a few mutations of it, without atheris.
"""
