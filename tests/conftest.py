"""What every test shares: hypothesis without wall-time limits, for machines that are busy."""

from hypothesis import settings

settings.register_profile("house", deadline=None, print_blob=True)
settings.load_profile("house")
