"""One file per dataset: where its photographs are, and how to read its split."""
