"""The refusals that a caller may answer with another implementation. Imports nothing."""


class NotForCpuError(ValueError):
    """A model that is readable, but not by the kernels of kernels/cpu; the message says why."""


class NotForDeviceError(ValueError):
    """A model that is readable, but not by the decoder of models/device; the message says why."""
