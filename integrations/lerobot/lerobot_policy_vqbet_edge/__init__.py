"""LeRobot runs a compiled VQ-BeT policy: `--policy.path=NAME.bundle`.

LeRobot imports this package on its own, because of the distribution's name, and finds the policy
and the processors by the modules' names.
"""

from lerobot_policy_vqbet_edge.configuration_vqbet_edge import VqbetEdgeConfig
from lerobot_policy_vqbet_edge.modeling_vqbet_edge import VqbetEdgePolicy
from lerobot_policy_vqbet_edge.processor_vqbet_edge import make_vqbet_edge_pre_post_processors

__all__ = ["VqbetEdgeConfig", "VqbetEdgePolicy", "make_vqbet_edge_pre_post_processors"]
