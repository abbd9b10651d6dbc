"""The native attention library: C sources, and `library` that loads what was built of them."""
