"""Which form of a job is fastest, and what each costs: `sanderling train --advise job.toml`."""
