"""Tests of the line between processes: over real sockets, with a reactor `by_hand`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
