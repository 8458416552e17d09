"""Layout arithmetic (pure), buckets, residency and its one transition table."""
