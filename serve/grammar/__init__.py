"""What an answer may look like: the terms, their compilation, and the tokens they allow next."""
