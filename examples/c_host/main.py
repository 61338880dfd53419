"""Builds host.c and runs it."""

import sys
import sysconfig
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))
from embed import build_and_run  # noqa: E402

build_and_run(here / "host.c", (sysconfig.get_config_var("CC") or "cc").split())
