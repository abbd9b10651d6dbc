"""The weights of a bundle: matrices carried over or quantized, and the one file that holds them."""
