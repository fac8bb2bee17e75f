"""The decoder of a GPU: the same model as decoder.py, made of the ops of kernels/ops.

`models.load.device` builds one, `serve/engine/device_runner.py` runs it.
"""
