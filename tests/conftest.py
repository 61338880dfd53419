"""Settings and fixtures of all tests: no example has a deadline, since machines are shared and a first call imports."""

import os
import signal

import pytest
from hypothesis import settings
from wheels import place, sdist, wheel, wheel_python  # noqa: F401

from modprop_fast import core, network

settings.register_profile("house", deadline=None)
settings.load_profile("house")

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts the tests in the background has it ignored


@pytest.fixture(scope="module", params=["by size", "none at once"])
def at_once_or_not(request):
    """Small networks write all at every step; of a test that takes this none does, so that it sees what large ones do."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "none at once":
            for limit in ("AT_ONCE", "SIGNED_AT_ONCE", "MASKED_AT_ONCE"):
                patch.setattr(core, limit, 0)
        yield


if "libasan" in os.environ.get("LD_PRELOAD", ""):  # see .ci/sanitize
    import apart

    core.aligned = network.aligned = apart.aligned
