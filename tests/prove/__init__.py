"""The checks of the proof table: each module returns rows that one command prints."""
