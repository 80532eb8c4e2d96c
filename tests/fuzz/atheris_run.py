"""Runs one harness under atheris: python -m tests.fuzz.atheris_run NAME [OPTIONS OF LIBFUZZER]"""

from __future__ import annotations

import sys

import atheris

# Modules are instrumented while they are imported.
with atheris.instrument_imports(include=["dockerproxy"]):
    from tests.fuzz.harnesses import HARNESSES

if __name__ == "__main__":
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, HARNESSES[name])
    atheris.Fuzz()
