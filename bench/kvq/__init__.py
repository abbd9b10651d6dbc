"""kvq's own arms and what is measured of them besides."""
