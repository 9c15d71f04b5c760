"""From files to micro-batches: sources, audit, encode (cached), plan, loader."""
