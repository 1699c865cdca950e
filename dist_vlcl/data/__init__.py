"""Raw image sets in, class-pure shards on disk, the same global batches out for every number of ranks."""
