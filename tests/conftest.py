"""Settings of all tests: no example has a deadline, since machines are shared and the first call imports and allocates."""

from hypothesis import settings

settings.register_profile("house", deadline=None)
settings.load_profile("house")
