"""One file per method: the only place that knows its objective."""
