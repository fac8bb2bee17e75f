"""The inner loop of a replica: sequences, scheduler, step, sampler. Knows no Ray and no HTTP."""
