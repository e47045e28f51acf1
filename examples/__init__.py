"""Programs to read and to begin with; not part of the installed package."""
