"""The paper's claims, tested: what is run (experiments), what came out (outcomes), what follows (claims)."""
