"""What the machine gives: threads, BLAS, huge pages; what it keeps to itself."""
