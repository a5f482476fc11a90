"""Pages of results, a file each: frame, charts and tables; the page of a run, made from what it left."""
