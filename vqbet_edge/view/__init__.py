"""Showing recordings: needs neither torch nor a robot, and a robot never loads it."""
