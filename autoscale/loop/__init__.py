"""The control loop: signals in, actions out, every one with its reason. The same objects run over a
live service and over simulated time."""
