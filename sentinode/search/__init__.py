"""Searching over configurations: points of a space, where they come from, and the record of what became of them. No Ray in here."""
