"""Quality through the cache: divergence from the 16-bit model, arms at equal bytes, tasks."""
