"""What a run leaves for people: one page, its curves, pictures and claims."""
