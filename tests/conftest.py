"""Settings and fixtures of all tests: no example has a deadline, since machines are shared and the first call imports and allocates."""

from hypothesis import settings
from wheels import place, sdist, wheel, wheel_python  # noqa: F401

settings.register_profile("house", deadline=None)
settings.load_profile("house")
