"""The ament_python package `vqbet_edge_ros`."""

from setuptools import setup

NAME = "vqbet_edge_ros"

setup(
    name=NAME,
    version="0.1.0",
    description="A trained VQ-BeT robot policy as a ROS 2 lifecycle node, without PyTorch.",
    license="Apache-2.0",
    packages=[NAME],
    python_requires=">=3.10",
    # rclpy and the messages are the system's, and vqbet_edge is installed before.
    install_requires=["setuptools"],
    zip_safe=True,
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/launch", ["launch/policy.launch.py"]),
        (f"share/{NAME}/config", ["config/pusht.yaml"]),
    ],
    entry_points={"console_scripts": [f"policy = {NAME}.main:main"]},
)
