"""What a training run does about lost machines: named techniques, each in its module."""
