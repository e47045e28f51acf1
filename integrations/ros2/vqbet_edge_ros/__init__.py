"""vqbet_edge_ros: a VQ-BeT bundle as a ROS 2 lifecycle node.

ros2 run vqbet_edge_ros policy --ros-args --params-file pusht.yaml

`node`, `resources`, `messages` and `main` import rclpy. Everything that decides (what an
observation is, whether it may be acted on, what is sent) does without, and is tested without ROS.
"""

__version__ = "0.1.0"
