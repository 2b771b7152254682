"""Readers of other projects' data sets: each one gives Opsin's records and can write them as shards."""
