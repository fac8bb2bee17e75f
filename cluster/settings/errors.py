"""The one error of settings: one or two sentences that name the setting and where it came from."""


class SettingsError(ValueError):
    """A setting is unknown or has a value that is not accepted; the message is for its author."""
