"""Workers of unlike speed in one job."""
