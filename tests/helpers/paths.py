"""Where the repository and the real records lie."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TESTS = REPOSITORY / "tests"
DATA = Path(os.environ.get("SPHERE_DATA") or REPOSITORY.parent / "shared" / "data")
