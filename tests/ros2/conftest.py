"""The tests in `node` run in an environment with ROS: test_node.py starts them there."""

collect_ignore = ["node"]
