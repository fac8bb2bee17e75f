"""Training: a job file in, a folder that `sanderling up --model` serves out. See README.md."""
