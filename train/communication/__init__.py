"""What workers tell each other of a gradient: compressors, counted bytes, overlap."""
