"""Work in shards, done in this process or by the workers of a Ray cluster, to the same bytes.

Which of them does it is in no digest: what a shard is, and what it holds, is the job's alone.
"""
