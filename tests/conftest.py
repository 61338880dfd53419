"""Settings and fixtures of all tests: no example has a deadline, since machines are shared and a first call imports."""

import os

from hypothesis import settings
from wheels import place, sdist, wheel, wheel_python  # noqa: F401

from modprop_fast import core, network

settings.register_profile("house", deadline=None)
settings.load_profile("house")


if "libasan" in os.environ.get("LD_PRELOAD", ""):  # see .ci/sanitize
    import apart

    core.aligned = network.aligned = apart.aligned
