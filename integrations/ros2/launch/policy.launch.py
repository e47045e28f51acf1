"""ros2 launch vqbet_edge_ros policy.launch.py params:=/home/robot/pusht.yaml"""  # noqa: D415

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode


def generate_launch_description() -> LaunchDescription:
    """The node, with a file of parameters; `autostart` in there takes it to active."""
    return LaunchDescription(
        [
            DeclareLaunchArgument("params", description="a YAML file like config/pusht.yaml"),
            LifecycleNode(
                package="vqbet_edge_ros",
                executable="policy",
                name="vqbet_policy",
                namespace="",
                parameters=[LaunchConfiguration("params")],
                output="screen",
            ),
        ]
    )
