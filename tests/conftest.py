"""Settings and fixtures of all tests: no example has a deadline, since machines are shared and a first call imports."""

from hypothesis import settings
from wheels import place, sdist, wheel, wheel_python  # noqa: F401

settings.register_profile("house", deadline=None)
settings.load_profile("house")
