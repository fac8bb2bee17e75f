"""The one refusal that a caller may answer with another implementation. Imports nothing."""


class NotForCpuError(ValueError):
    """A model that is readable, but not by the kernels of kernels/cpu; the message says why."""
