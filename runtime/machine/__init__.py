"""What the machine gives: threads, BLAS, huge pages."""
