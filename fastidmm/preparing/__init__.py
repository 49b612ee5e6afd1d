"""From photographs on disk or on the web to a store: fetch, unpack, list, decode, check, write."""
