"""Reading LeRobot data sets; the robot never imports this."""
