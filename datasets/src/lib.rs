//! What Potstill stores: records, Parquet, journal, tokens and chat templates, batches
