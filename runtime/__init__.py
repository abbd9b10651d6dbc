"""Bundle loading, KV store, codecs, attention backends, decode loop, sampling and command line."""
