"""A reader for each kind of data source."""
