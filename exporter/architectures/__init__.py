"""What a layer computes, one file an architecture."""
