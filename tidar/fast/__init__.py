"""The fast path: what a GPU runs in place of the general one. Equal to it, and tested so."""
