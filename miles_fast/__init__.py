"""MILES pre-training: shards in, retrieval numbers and weights out."""
