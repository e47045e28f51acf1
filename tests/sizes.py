"""A network that is quick to train, export and run."""

from typing import Any

SMALL: dict[str, Any] = {
    "vision_backbone": "resnet10_small",
    "gpt_n_layer": 1,
    "gpt_n_head": 2,
    "gpt_hidden_dim": 32,
    "gpt_input_dim": 32,
    "gpt_output_dim": 32,
}
