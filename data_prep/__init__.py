"""TIF patches and labels to a prepared data set: sharded Parquet, leak-safe splits, a report. `prepare.prepare` is the verb."""
