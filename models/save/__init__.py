"""Writes models: a GGUF file with the weights in a chosen format, of whatever `models.load` reads.

`open_source` finds what is there, `write_gguf` rounds and writes it, `formats` lists what weights
may become. Errors are ValueErrors with one sentence that names the model and what is accepted.
"""

from models.save.formats import WEIGHT_FORMATS, weight_format
from models.save.gguf import Written, refuse, write_gguf
from models.save.source import Source, open_source

__all__ = [
    "WEIGHT_FORMATS",
    "Source",
    "Written",
    "open_source",
    "refuse",
    "weight_format",
    "write_gguf",
]
