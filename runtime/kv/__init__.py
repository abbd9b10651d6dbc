"""The KV store: pages, buckets, the recent window."""
