"""Where machines come from: one contract, and a folder for each kind of place that fulfils it."""
